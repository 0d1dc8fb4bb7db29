"""AdaMix: its accounting, its bound, its algebra, and that public things come from public records alone."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_dp.callbacks import PrivacyCard
from lightning_dp.data import RecordDataset, Records
from lightning_dp.data.records import content_hashes
from lightning_dp.errors import ConfigError
from lightning_dp.methods import (
    AdaMix,
    DPModule,
    FeaturePCA,
    FewShot,
    GradientSpan,
    InverseTimeLR,
    PublicHead,
    ZeroHead,
)
from lightning_dp.methods.adamix import bounded_sum, residuals_of
from lightning_dp.methods.public_head import text_head, with_bias
from lightning_dp.methods.record_losses import gaussian_epsilon
from lightning_dp.models import LinearHead
from lightning_dp.privacy import accounting
from lightning_dp.privacy.accounting import Release
from tests.methods.runs import PRIVACY, fit, make_data, make_trainer, weights

SIZE = 1237  # private digits beside 100 audited and 10 public ones per class
FULL = dataclasses.replace(PRIVACY, num_examples=SIZE, expected_batch_size=SIZE, noise_multiplier=2.0, steps=3)
MODES = [
    pytest.param(None, "clip_first", id="none"),
    pytest.param(GradientSpan(20), "clip_first", id="span"),
    pytest.param(GradientSpan(20), "project_first", id="span-first"),
    pytest.param(FeaturePCA(8), "clip_first", id="pca"),
    pytest.param(FeaturePCA(8), "project_first", id="pca-first"),
]


def make(privacy=FULL, **settings):
    plain = {"optimizer": partial(torch.optim.SGD, lr=0.5), "start": FewShot(0.01)}
    return AdaMix(LinearHead(1, 8, 10), privacy=privacy, **{**plain, **settings})


def changed(privacy, change):
    """The digits with other private records: ``change`` maps (images, labels) to others."""
    data = make_data(privacy)
    data.setup("fit")
    private = data.role("private")
    data._datasets["private"] = RecordDataset(Records(*change(private.images.clone(), private.labels.clone())))
    return data


def other_record(images, labels):
    images[3], labels[3] = 255 - images[3], (labels[3] + 1) % 10
    return images, labels


class FirstStep(Callback):
    """Keeps what the first step took from public records."""

    def on_train_batch_start(self, trainer, module, batch, index):
        self.step = module.public_step()


@pytest.mark.parametrize(
    ("epsilon", "steps", "sigma"),
    [(1, 200, 52.759), (2, 100, 19.938), (3, 500, 31.095)],
)
def test_calibrated_noise_is_that_of_the_analytic_gaussian(epsilon, steps, sigma):
    assert accounting.calibrate(epsilon, 1e-5, 1.0, steps) == pytest.approx(sigma, rel=1e-3)


@pytest.mark.parametrize(("steps", "sigma"), [(200, 52.759), (200, 19.666), (37, 5.0), (1, 1.0), (500, 13.422)])
def test_full_batch_epsilon_is_the_analytic_one(steps, sigma):
    exact = gaussian_epsilon(steps**0.5 / sigma, 1e-5)
    certified = accounting.epsilon([Release(sigma, 1.0, steps)], 1e-5)
    assert exact - 1e-9 <= certified <= exact + 1e-3


def test_exact_epsilon_solves_its_own_equation():
    from scipy.stats import norm

    for mu in (0.1, 0.7, 3.0):
        eps = gaussian_epsilon(mu, 1e-5)
        delta = norm.cdf(mu / 2 - eps / mu) - np.exp(eps) * norm.cdf(-mu / 2 - eps / mu)
        assert delta == pytest.approx(1e-5, rel=1e-6)


def made(records, values, classes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(records, values, generator=generator, dtype=dtype)
    residuals = torch.randn(records, classes, generator=generator, dtype=dtype)
    return residuals, features


@pytest.mark.parametrize("rank", [None, 5])
def test_the_gram_trick_equals_the_dense_decomposition(rank):
    residuals, features = made(12, 30, 4)
    gradient = made(4, 30, 4, seed=1)[0].T @ made(4, 30, 4, seed=1)[1]
    rows = torch.einsum("ic,id->icd", residuals, features).flatten(1)
    basis = torch.linalg.svd(rows, full_matrices=False)[2][:rank]
    dense = (basis.T @ (basis @ gradient.flatten())).view_as(gradient)
    torch.testing.assert_close(GradientSpan(rank)(residuals, features).project(gradient), dense, rtol=0, atol=1e-8)
    basis = torch.linalg.svd(features, full_matrices=False)[2][:rank]
    dense = gradient @ basis.T @ basis
    torch.testing.assert_close(FeaturePCA(rank)(residuals, features).project(gradient), dense, rtol=0, atol=1e-8)


@pytest.mark.parametrize("projection", [GradientSpan(6), FeaturePCA(6)])
def test_noise_before_and_after_the_projection_is_equal_in_law(projection):
    """Projected white noise has white coordinates, and lifting keeps lengths: cov(P n) is P."""
    residuals, features = made(12, 30, 4)
    subspace = projection(residuals, features)
    units = torch.eye(4 * 30, dtype=torch.float64).view(-1, 4, 30)
    coordinates = torch.stack([subspace.coordinates_of(unit) for unit in units], dim=1)
    k = len(coordinates)
    torch.testing.assert_close(coordinates @ coordinates.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-8)
    lifted = torch.stack([subspace.lift(unit).flatten() for unit in torch.eye(k, dtype=torch.float64)])
    torch.testing.assert_close(lifted, coordinates, rtol=0, atol=1e-8)
    one = subspace.coordinates(residuals[:1], features[:1])[0]
    torch.testing.assert_close(one, subspace.coordinates_of(residuals[:1].T @ features[:1]), rtol=0, atol=1e-8)


def test_vanishing_and_repeated_public_gradients_give_no_direction():
    residuals, features = made(3, 30, 4)
    twice = GradientSpan()(torch.cat([residuals, residuals]), torch.cat([features, features]))
    assert twice.coordinates_of(residuals.T @ features).shape == (3,)
    none = GradientSpan()(torch.zeros(3, 4), features.float())
    assert torch.equal(none.project(torch.ones(4, 30)), torch.zeros(4, 30))


@pytest.mark.parametrize("projection", [None, GradientSpan(6), FeaturePCA(6)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 1e4])
def test_one_record_moves_the_sum_by_at_most_one(projection, scale):
    residuals, features = made(200, 300, 10, dtype=torch.float32)
    public = made(12, 300, 10, seed=1, dtype=torch.float32)
    subspace = None if projection is None else projection(*public)
    total, lengths = bounded_sum(residuals * scale, features, 0.7, "flat", subspace)
    moved = []
    for i in range(20):
        rest = torch.arange(200) != i
        without, _ = bounded_sum(residuals[rest] * scale, features[rest], 0.7, "flat", subspace)
        moved.append(float((total.double() - without.double()).norm()))
    assert max(moved) <= 1 + 1e-4  # rounding of a float32 sum of 200 records
    assert float(lengths.max()) <= 1
    if scale == 1e4:
        one, _ = bounded_sum(residuals[:1] * scale, features[:1], 0.7, "flat", subspace)
        assert 0.999 < float(one.norm()) <= 1


@pytest.mark.parametrize("projection", [None, FeaturePCA(6)])
def test_a_record_that_is_not_finite_contributes_zero(projection):
    residuals, features = made(20, 30, 4)
    subspace = None if projection is None else projection(*made(12, 30, 4, seed=1))
    expected, _ = bounded_sum(residuals[2:], features[2:], 1.0, "flat", subspace)
    features[0, 0], features[1, 0] = float("nan"), float("inf")
    total, lengths = bounded_sum(residuals, features, 1.0, "flat", subspace)
    torch.testing.assert_close(total, expected)
    assert lengths[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("projection", "order"), MODES)
def test_a_record_moves_one_step_by_at_most_the_clip_norm(tmp_path, projection, order):
    """Whole runs on neighbouring data: same noise, one record replaced; the head moves by <= 2 lr tau / (N + M)."""
    privacy = dataclasses.replace(FULL, steps=1)
    ends, steps = [], []
    for name, data in (("a", make_data(privacy)), ("b", changed(privacy, other_record))):
        module, first = make(privacy, projection=projection, order=order), FirstStep()
        fit(tmp_path / name, module, data, max_steps=1, callbacks=[first])
        ends.append(weights(module))
        steps.append(first.step)
    most = 2 * 0.5 * steps[0].clip_norm / (SIZE + 100)
    assert 0 < (ends[0] - ends[1]).norm() <= most * (1 + 1e-3)


@pytest.mark.parametrize(("projection", "order"), MODES)
def test_clip_norm_and_subspace_do_not_depend_on_private_records(tmp_path, projection, order):
    privacy = dataclasses.replace(FULL, steps=1)
    steps, starts = [], []

    def all_other(images, labels):
        return 255 - images, labels.roll(1)

    for name, data in (("a", make_data(privacy)), ("b", changed(privacy, all_other))):
        module, first = make(privacy, projection=projection, order=order), FirstStep()
        fit(tmp_path / name, module, data, max_steps=1, callbacks=[first])
        steps.append(first.step)
        starts.append(weights(module))
    assert steps[0].clip_norm == steps[1].clip_norm
    assert torch.equal(steps[0].residuals, steps[1].residuals)
    gradient = torch.linspace(-1, 1, 650).view(10, 65)
    for step in steps:
        if step.subspace is not None:
            assert torch.equal(step.subspace.project(gradient), steps[0].subspace.project(gradient))
    assert not torch.equal(starts[0], starts[1])  # the private records were others


@pytest.mark.parametrize(("projection", "order"), MODES)
def test_the_closed_form_equals_the_sum_over_records(tmp_path, projection, order):
    module = make(projection=projection, order=order, physical_batch_size=100)
    compared = []

    class Compare(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            records = (batch[0][:250], torch.zeros(250, 0), batch[1][:250])
            fast = module.clipped_sum(records)["gradient"]
            compared.append((fast, DPModule.clipped_sum(module, records)["gradient"]))

    fit(tmp_path, module, max_steps=1, callbacks=[Compare()])
    torch.testing.assert_close(*compared[0], rtol=0, atol=1e-4)
    assert compared[0][0].norm() > 1


@pytest.mark.parametrize(("projection", "order"), MODES)
def test_a_record_under_autocast_stays_inside_the_ball(tmp_path, projection, order):
    """A clipped row that is rounded to bfloat16 may be longer than 1."""
    module = make(projection=projection, order=order, clip_quantile=None, clip_norm=1e-6)
    lengths = []

    class Lengths(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            with torch.autocast("cpu", torch.bfloat16):
                for image, label in zip(batch[0][:50, None], batch[1][:50, None], strict=True):
                    lengths.append(module.clipped_sum((image, torch.zeros(1, 0), label))["gradient"].double().norm())

    fit(tmp_path, module, max_steps=1, callbacks=[Lengths()])
    assert 0.99 < max(lengths) <= 1


def test_without_noise_and_clipping_it_is_gradient_descent_on_public_and_private_records(tmp_path):
    privacy = dataclasses.replace(FULL, noise_multiplier=0.0, steps=5)
    decay = partial(InverseTimeLR, half_life=4)
    settings = {"start": ZeroHead(), "clip_quantile": None, "clip_norm": 1e6, "weight_decay": 0.1, "scheduler": decay}
    module = fit(tmp_path, make(privacy, **settings), max_steps=5)

    data = make_data(None)
    data.setup("test")
    roles = [data.role(name) for name in ("private", "public")]
    images = data.normalize(torch.cat([role.images for role in roles]))
    labels = torch.cat([role.labels for role in roles])
    net = LinearHead(1, 8, 10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, weight_decay=0.1)
    schedule = InverseTimeLR(optimizer, 4)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        schedule.step()
    expected = torch.cat([value.detach().reshape(-1) for value in net.parameters()])
    torch.testing.assert_close(weights(module), expected, rtol=0, atol=1e-5)


def test_noise_reaches_the_head_at_that_steps_clip_norm(tmp_path):
    """Two seeds, one step: the difference is noise of two draws, scaled by the step's own tau."""
    ends = []
    for seed in (1, 2):
        privacy = dataclasses.replace(FULL, steps=1, noise_multiplier=40.0, seed=seed)
        first = FirstStep()
        module = fit(tmp_path / str(seed), make(privacy), max_steps=1, callbacks=[first])
        ends.append(weights(module))
    expected = 2**0.5 * 40.0 * first.step.clip_norm * 0.5 / (SIZE + 100) * module.damping()
    assert (ends[0] - ends[1]).std().item() == pytest.approx(expected, rel=4 / (2 * 650) ** 0.5)


def test_the_clip_norm_is_a_quantile_of_public_norms_with_a_floor(tmp_path):
    first = FirstStep()
    module = fit(tmp_path, make(clip_quantile=0.5), max_steps=1, callbacks=[first])
    data = make_data(None)
    data.setup("test")
    public = data.role("public")
    features = with_bias(LinearHead(1, 8, 10), data.normalize(public.images))
    head = FewShot(0.01)(features, public.labels, 10)
    residuals = residuals_of(head, features, public.labels)
    norms = [float((a[:, None] * x).norm()) for a, x in zip(residuals, features, strict=True)]
    assert first.step.clip_norm == pytest.approx(np.median(norms), rel=1e-5)
    module = fit(tmp_path / "floor", make(clip_floor=1e3), max_steps=1, callbacks=[first])
    assert first.step.clip_norm == 1e3
    assert len(module.mechanism.ledger) == 1


def test_few_shots_are_fitted_to_the_minimum():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(30, 8, generator=generator), torch.arange(30) % 3
    head = FewShot(0.05)(features, labels, 3)
    gradient = residuals_of(head, features, labels).T @ features / 30 + 0.05 * features.square().sum(1).mean() * head
    assert gradient.norm() < 1e-4 * head.norm()


def test_one_step_is_one_release_also_in_poisson_batches(tmp_path):
    for privacy in (FULL, dataclasses.replace(FULL, num_examples=1240, expected_batch_size=60)):
        module = fit(tmp_path / str(privacy.expected_batch_size), make(privacy), max_steps=3)
        assert module.mechanism.ledger.releases == (Release(2.0, privacy.sample_rate, 3),)
        assert module.trainer.global_step == 3
        assert weights(module).isfinite().all()


def test_a_run_that_ended_is_so_in_the_ledger_of_the_data(tmp_path):
    module = make()
    fit(tmp_path, module, max_steps=FULL.steps)
    assert module.dataset_ledger is not None
    (run,) = module.dataset_ledger.runs()
    assert run.ended
    assert run.releases() == module.mechanism.ledger.releases


def test_poisson_batches_estimate_the_full_gradient(tmp_path):
    """Without noise, many one-step runs on batches average to the full-batch step."""

    def run(privacy):
        return weights(fit(tmp_path / str(privacy.seed), make(privacy), max_steps=1))

    quiet = dataclasses.replace(FULL, steps=1, noise_multiplier=0.0)
    full = run(quiet)
    batches = dataclasses.replace(quiet, expected_batch_size=618)
    mean = torch.stack([run(dataclasses.replace(batches, seed=seed)) for seed in range(8)]).mean(0)
    first = FirstStep()
    module = make(quiet, optimizer=partial(torch.optim.SGD, lr=0.0))
    start = weights(fit(tmp_path / "start", module, max_steps=1, callbacks=[first]))
    assert (mean - full).norm() < 0.3 * (full - start).norm()


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    privacy = dataclasses.replace(FULL, steps=6)
    whole = fit(tmp_path / "whole", make(privacy), max_steps=6)
    saver = ModelCheckpoint(tmp_path / "cut", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(tmp_path / "cut", make(privacy), max_steps=3, callbacks=[saver], enable_checkpointing=True)
    checkpoint = str(tmp_path / "cut" / "step=3.ckpt")
    assert torch.load(checkpoint, weights_only=True)["privacy"]
    again = fit(tmp_path / "again", make(privacy), max_steps=6, ckpt_path=checkpoint)
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=1e-5)


def test_public_shots_are_not_private():
    data = make_data(FULL)
    data.setup("fit")
    private, public = (set(content_hashes(data.role(name).images)) for name in ("private", "public"))
    assert len(data.role("public")) == 100
    assert not private & public


def test_only_public_is_the_start_of_adamix_whatever_the_private_records(tmp_path):
    privacy = dataclasses.replace(FULL, steps=1)
    heads = []
    for name, data in (("a", make_data(privacy)), ("b", changed(privacy, lambda i, y: (255 - i, y.roll(1))))):
        module = PublicHead(LinearHead(1, 8, 10), FewShot(0.01), privacy=privacy)
        heads.append(weights(fit(tmp_path / name, module, data, max_steps=1)))
        assert module.trainer.global_step == 1
    assert torch.equal(heads[0], heads[1])
    frozen = make(privacy, optimizer=partial(torch.optim.SGD, lr=0.0))
    assert torch.equal(weights(fit(tmp_path / "start", frozen, max_steps=1)), heads[0])
    result = make_trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert result[0]["test/accuracy"] > 0.8


def test_record_losses_are_private_opt_in_and_on_the_card(tmp_path):
    module = make(clip_quantile=None, clip_norm=1e-6, record_losses=True)  # every record is clipped to length 1
    fit(tmp_path, module, max_steps=3, callbacks=[PrivacyCard()], logger=True)
    folder = next(tmp_path.glob("**/private"))
    assert folder.stat().st_mode & 0o077 == 0
    losses = np.load(folder / "record_losses.npz")
    np.testing.assert_allclose(losses["mu"], 3**0.5 / 2.0, rtol=1e-4)
    assert losses["mu"].max() <= 3**0.5 / 2.0
    np.testing.assert_allclose(losses["epsilon"], module.mechanism.epsilon(), rtol=5e-3)
    assert (folder / "record_losses.png").is_file()
    card = json.loads(next(tmp_path.glob("**/privacy_card.json")).read_text())
    assert any("NOT FOR RELEASE" in line for line in card["outside_the_guarantee"])
    module.trainer.save_checkpoint(tmp_path / "end.ckpt")
    resumed = make(clip_quantile=None, clip_norm=1e-6)
    resumed.on_load_checkpoint(torch.load(tmp_path / "end.ckpt", weights_only=True))
    assert len(resumed.private_diagnostics()) == 1

    fit(tmp_path / "plain", make(), max_steps=3, callbacks=[PrivacyCard()], logger=True)
    assert not list((tmp_path / "plain").glob("**/private"))
    card = json.loads(next((tmp_path / "plain").glob("**/privacy_card.json")).read_text())
    assert not any("NOT FOR RELEASE" in line for line in card["outside_the_guarantee"])


def test_record_losses_of_several_processes_are_refused_before_anything_is_released(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "world_size", 2)
    module = make(record_losses=True)
    with pytest.raises(ConfigError, match=r"record_losses needs one process"):
        fit(tmp_path, module, max_steps=1)
    assert len(module.mechanism.ledger) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"privacy": dataclasses.replace(FULL, max_norm=0.5)}, "privacy.max_norm 0.5 must be 1"),
        ({"clip_quantile": 1.5}, "model.clip_quantile 1.5"),
        ({"clip_norm": float("inf")}, "model.clip_norm"),
        ({"record_losses": True, "privacy": PRIVACY}, "record_losses needs noise and the full batch"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_other_networks_and_ranks_are_refused():
    with pytest.raises(ConfigError, match="not Sequential"):
        AdaMix(nn.Sequential(nn.Linear(2, 2)), partial(torch.optim.SGD, lr=1.0), ZeroHead())
    for make_part in (lambda: FeaturePCA(0), lambda: GradientSpan(-1), lambda: FewShot(0.0)):
        with pytest.raises(ConfigError):
            make_part()


def test_without_public_records_it_stops_before_anything_is_released(tmp_path):
    data = make_data(FULL)
    data.setup("fit")
    data._datasets["public"] = RecordDataset(Records(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)))
    module = make()
    with pytest.raises(ConfigError, match="no 'public' records"):
        fit(tmp_path, module, data, max_steps=1)
    assert len(module.mechanism.ledger) == 0


def test_a_text_head_has_scaled_directions_of_the_prompts():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    tower = open_clip.CLIP(12, vision, text).eval()
    prompts = ["a photo of a cat.", "a photo of a dog."]
    head = text_head(tower, open_clip.SimpleTokenizer(), prompts, 100.0, torch.zeros(3, 13))
    assert head.shape == (2, 13)
    assert torch.equal(head[:, -1], torch.zeros(2))
    expected = tower.encode_text(open_clip.SimpleTokenizer()(prompts), normalize=True).detach()
    torch.testing.assert_close(head[:, :-1], 100 * expected)
    with pytest.raises(ConfigError, match="12 values but the features 20"):
        text_head(tower, open_clip.SimpleTokenizer(), prompts, 100.0, torch.zeros(3, 21))


def test_steps_are_damped_by_public_numbers_where_noise_is_long(tmp_path):
    """One step from zero, on the same noise: the head is the undamped one times 0.02 N / sigma."""
    privacy = dataclasses.replace(FULL, noise_multiplier=200.0, steps=1)
    settings = {"start": ZeroHead(), "clip_quantile": None, "clip_norm": 1.0}
    damped, whole, short = (
        fit(tmp_path / str(damping), make(privacy, noise_damping=damping, **settings), max_steps=1)
        for damping in (0.02, None, 1.0)
    )
    factor = 0.02 * SIZE / 200.0
    torch.testing.assert_close(weights(damped), factor * weights(whole))
    assert damped.damping() == pytest.approx(factor)
    assert short.damping() == whole.damping() == 1.0
    torch.testing.assert_close(weights(short), weights(whole))
    with pytest.raises(ConfigError, match="noise_damping"):
        make(noise_damping=0.0)
