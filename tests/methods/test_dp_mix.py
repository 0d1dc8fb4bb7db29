"""DP-Mix on its real path: what the released code got wrong cannot come back."""

import copy
import dataclasses
from functools import partial
from itertools import pairwise

import pytest
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_dp.data import RecordDataset, Records, Shift
from lightning_dp.errors import ConfigError
from lightning_dp.methods import DPSGD, DPMix, dp_mix
from lightning_dp.models import Encoder, EncoderClassifier, LinearHead
from lightning_dp.privacy.accounting import Release
from lightning_dp.privacy.engines import OneBackward
from lightning_dp.privacy.sampling import PoissonBatchSampler
from tests import reference
from tests.data.made import Generated
from tests.methods.runs import PRIVACY, STEPS, fit, make_data, make_module, weights
from tests.methods.test_ddp import load, run_two

SELF = {"k_base": 3, "k_self": 4}
DIFF = {"k_base": 3, "k_self": 4, "k_diff": 2}
PLANS = [{"k_base": 1, "k_self": 0}, SELF, DIFF]
ONE_STEP = dataclasses.replace(PRIVACY, steps=1)


def mix(privacy=PRIVACY, **settings):
    return make_module(privacy, method=DPMix, **{**DIFF, **settings})


def mix_data(privacy=PRIVACY, **settings):
    return make_data(privacy, **{"augment": Shift(1), "synthetic": Generated(), **settings})


@pytest.fixture
def small(tmp_path):
    """Makes a module after one step, some private images and labels, and their coins."""

    def make(records=5):
        data = mix_data(ONE_STEP)
        module = fit(tmp_path, mix(ONE_STEP), data, max_steps=1)
        chosen = data.role("private")
        coins = module.record_coins(records, module.mechanism.randomness.numpy("test", 3))
        return module, chosen.images[:records], chosen.labels[:records], coins

    return make


@pytest.fixture
def seen(monkeypatch):
    """Everything that make_views got and gave in the fits of a test."""
    calls, original = [], dp_mix.make_views

    def spy(images, labels, coins, *rest):
        views, targets = original(images, labels, coins, *rest)
        calls.append((images, labels, coins, views, targets))
        return views, targets

    monkeypatch.setattr(dp_mix, "make_views", spy)
    monkeypatch.setattr(OneBackward, "_records_per_pass", lambda *arguments: 1 << 30)  # one pass, and no look before it
    return calls


def test_one_view_is_dp_sgd_bit_for_bit(tmp_path):
    mixed = fit(tmp_path / "mix", mix(k_base=1, k_self=0, k_diff=0), mix_data())
    plain = fit(tmp_path / "plain", make_module(method=DPSGD), mix_data())
    assert torch.equal(weights(mixed), weights(plain))
    assert not mixed.engine.uses_reference


def test_base_views_alone_are_self_aug(tmp_path, seen):
    """The views are De et al.'s, bit for bit; the sum is that of the mean gradient over them."""
    module = fit(tmp_path, mix(ONE_STEP, k_base=4, k_self=0, k_diff=0), mix_data(ONE_STEP), max_steps=1)
    images, labels, coins, views, _ = seen[0]
    inputs = module.datamodule.normalize(images)
    for k in range(4):
        assert torch.equal(views[:, k], Shift(1)(inputs, coins[:, 2 * k : 2 * k + 2]))
    rows = [mean_gradient(module.net, own, label) for own, label in zip(views, labels, strict=True)]
    for max_norm in (1.0, 1e6):  # all clipped, none clipped
        expected = reference.clipped_sum(rows, max_norm)
        torch.testing.assert_close(engine_sum(module, images, coins, labels, max_norm), expected, rtol=1e-4, atol=1e-4)


def mean_gradient(net, views, label):
    rows = reference.record_gradients(net, F.cross_entropy, views, label.expand(len(views)))
    return torch.stack(rows).mean(0)


def engine_sum(module, images, coins, labels, max_norm):
    total = module.engine.clipped_sum(
        (images, coins, labels), module.template(), max_norm=max_norm, chunk=2, prepare=module.prepare
    )
    return torch.cat([value.reshape(-1) for value in total.values()])


@pytest.mark.parametrize("mix_labels", [True, False])
def test_labels_of_self_stay_exactly_one_hot(tmp_path, seen, mix_labels):
    fit(tmp_path, mix(**SELF, k_diff=0, mix_labels=mix_labels), mix_data())
    for _, labels, coins, views, targets in seen:
        assert views.shape[1] == targets.shape[1] == 7
        assert torch.equal(targets, F.one_hot(labels, 10).float()[:, None].expand(-1, 7, -1))
        assert coins[:, -4:].unique().numel() > 4  # lambdas of their own


def test_image_and_label_share_partners_and_lambda(small):
    """The released code used one image for both partners, so only labels were mixed."""
    module, images, labels, coins = small()
    coins[:, -4:] = 0.5
    views, targets = module.prepare(images, coins, labels)
    pool, mixed = (views[:, :5], targets[:, :5]), (views[:, 5:], targets[:, 5:])
    half = 0
    for record in range(len(images)):
        for k in range(4):
            partners = [
                (i, j)
                for i in range(5)
                for j in range(5)
                if torch.equal(mixed[0][record, k], torch.lerp(pool[0][record, j], pool[0][record, i], 0.5))
            ]
            assert partners
            for i, j in partners:
                mean = (pool[1][record, i] + pool[1][record, j]) / 2
                assert torch.equal(mixed[1][record, k], mean)
                if not torch.equal(pool[0][record, i], pool[0][record, j]):
                    half += 1
                    assert not torch.equal(mixed[0][record, k], pool[0][record, i])
                    assert not torch.equal(mixed[0][record, k], pool[0][record, j])
    assert half > 10


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_every_view_of_the_pool_is_mixed(small, weight):
    """The released code never drew the last one: with one synthetic image it was never mixed."""
    module, images, labels, coins = small(records=200)
    coins[:, -4:] = weight
    views, targets = module.prepare(images, coins, labels)
    same = torch.tensor([[(view == own).all() for own in row[:5]] for row in views for view in row[5:]])
    only = same[same.sum(1) == 1]
    counts = only.sum(0)
    assert (counts > 0.1 * len(only)).all()
    assert (targets.sum(2) == 1).all()


@pytest.mark.parametrize("plan", PLANS)
def test_a_record_moves_the_sum_by_at_most_the_clip_norm(tmp_path, plan):
    """Whole steps with steep losses: one record taken away, one record exchanged; all other coins are the same."""
    full = dataclasses.replace(ONE_STEP, num_examples=1237, expected_batch_size=1237)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.linspace(-30, 30, parameter.numel()).view_as(parameter).sin() * 50)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    ends = []
    for change in ("none", "remove", "exchange"):
        data = mix_data(full)
        data.setup("fit")
        images, labels = data._datasets["private"].__getitems__(range(1237 - (change == "remove")))
        if change == "exchange":
            images[3], labels[3] = 255 - images[3], (labels[3] + 1) % 10
        data._datasets["private"] = RecordDataset(Records(images, labels))
        net.load_state_dict(start)
        module = mix(full, net=net, optimizer=partial(torch.optim.SGD, lr=1237.0), **{"k_diff": 0, **plan})
        ends.append(weights(fit(tmp_path / change, module, data, max_steps=1)).clone())
    assert 0.5 < (ends[0] - ends[1]).norm() <= 1 + 1e-3
    assert 0 < (ends[0] - ends[2]).norm() <= 2 + 1e-3


def test_the_mean_over_views_comes_before_the_clip(small):
    """With clipping of single views, or clip and mean exchanged, the sum would be another."""
    module, images, labels, coins = small()
    views, targets = module.prepare(images, coins, labels)
    rows = [
        reference.record_gradients(module.net, F.cross_entropy, *record) for record in zip(views, targets, strict=True)
    ]
    before = reference.clipped_sum([torch.stack(views).mean(0) for views in rows], 0.7)
    after = sum(reference.clipped_sum(views, 0.7) / len(views) for views in rows)
    torch.testing.assert_close(engine_sum(module, images, coins, labels, 0.7), before)
    assert (before - after).norm() > 0.1 * before.norm()


def test_views_of_a_record_do_not_depend_on_the_batch(small):
    module, images, labels, coins = small()
    views, targets = module.prepare(images, coins, labels)
    for order in ([2], [4, 2, 0], [1, 2, 3, 4]):
        part, soft = module.prepare(images[order], coins[order], labels[order])
        assert torch.equal(part, views[order])
        assert torch.equal(soft, targets[order])


def test_noise_is_sigma_times_max_norm_over_the_expected_batch(tmp_path):
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(200_000))

        def forward(self, images):
            return images.flatten(1)[:, :10] + 0 * self.weight.sum()

    privacy = dataclasses.replace(ONE_STEP, noise_multiplier=1.7, max_norm=0.4)
    module = mix(privacy, net=Deaf(), optimizer=partial(torch.optim.SGD, lr=1.0), physical_batch_size=16)
    moved = weights(fit(tmp_path, module, mix_data(privacy), max_steps=1))
    assert moved.std().item() == pytest.approx(1.7 * 0.4 / 60, rel=4 / (2 * 200_000) ** 0.5)


def test_every_step_is_one_poisson_batch_and_one_release_whatever_the_views(tmp_path, seen):
    """The released code made a Poisson loader, did not use it, and accounted for it."""
    module = fit(tmp_path, mix(), mix_data())
    sampler = module.trainer.train_dataloader.batch_sampler
    assert type(sampler) is PoissonBatchSampler
    assert sampler.sample_rate == 60 / 1240
    assert module.mechanism.ledger.releases == (Release(1.0, 60 / 1240, STEPS),)
    assert module.trainer.global_step == STEPS
    # the batches that were mixed are the draws of that sampler: sizes vary, and no order repeats
    assert [len(images) for images, *_ in seen] == [len(sampler.draw(step)) for step in range(STEPS)]
    assert len({len(images) for images, *_ in seen}) > 3


def test_the_pool_takes_nothing_from_private_records(tmp_path):
    """Other private images and labels: the same pool, and the same synthetic images for the same coins."""
    pools, drawn = [], []
    for change in (False, True):
        data = mix_data(ONE_STEP)
        data.setup("fit")
        images, labels = data._datasets["private"].__getitems__(range(1237))
        if change:
            images, labels = 255 - images, torch.zeros_like(labels)
        data._datasets["private"] = RecordDataset(Records(images, labels))
        module = fit(tmp_path / str(change), mix(ONE_STEP), data, max_steps=1)
        coins = module.record_coins(20, module.mechanism.randomness.numpy("test", 0))
        views, targets = module.prepare(images[:20], coins, labels[:20])
        pools.append(module.synthetic)
        drawn.append((views[:, 3:5], targets[:, 3:5]))
    made = Generated().load(tmp_path, True, False)
    for pool in pools:
        assert torch.equal(pool.images, made.images)
        assert torch.equal(pool.labels, made.labels)
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


def test_chunks_change_nothing(tmp_path):
    whole, parts = (fit(tmp_path / str(chunk), mix(physical_batch_size=chunk), mix_data()) for chunk in (512, 7))
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-5)


def test_resumed_in_mid_epoch_equals_uninterrupted(tmp_path):
    settings = {"pretrain_steps": 5}
    save = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    whole = fit(tmp_path / "a", mix(**settings), mix_data(), callbacks=[save], enable_checkpointing=True)
    resumed = fit(tmp_path / "b", mix(**settings), mix_data(), ckpt_path=tmp_path / "step=5.ckpt")
    assert torch.equal(weights(resumed), weights(whole))


class Start(Callback):
    """Keeps the weights at the start of the first step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.weights = weights(pl_module).clone()


def test_pretraining_is_public_and_before_the_first_release(tmp_path):
    """It learns the synthetic images, and other private records, keys and global seeds leave it as it is."""
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        privacy = dataclasses.replace(ONE_STEP, seed=seed)
        data = mix_data(privacy)
        data.setup("fit")
        images, labels = data._datasets["private"].__getitems__(range(1237))
        data._datasets["private"] = RecordDataset(Records(images, (labels + seed) % 10))
        start = Start()
        module = mix(privacy, pretrain_steps=50, net=LinearHead(1, 8, 10))
        fit(tmp_path / str(seed), module, data, max_steps=1, callbacks=[start])
        assert len(module.mechanism.ledger) == 1
        starts.append(start.weights)
    assert torch.equal(*starts)
    made = Generated().load(tmp_path, True, False)
    inputs = module.datamodule.normalize(made.images).flatten(1)
    weight, bias = starts[0].split([640, 10])
    assert ((inputs @ weight.view(10, 64).T + bias).argmax(1) == made.labels).float().mean() > 0.9


def test_the_second_fit_does_not_pretrain(tmp_path):
    module = mix(pretrain_steps=5)
    fit(tmp_path / "a", module, mix_data())
    before, start = weights(module).clone(), Start()
    fit(tmp_path / "b", module, mix_data(), callbacks=[start])
    assert torch.equal(start.weights, before)


SETTINGS = {
    "k_self 4 would mix a single view": {"k_base": 1, "k_self": 4, "k_diff": 0},
    "include_unmixed_views false leaves no view": {"include_unmixed_views": False, "k_self": 0},
    "real_x_synthetic needs": {"pairing": "real_x_synthetic", "k_diff": 0},
    "k_base must be at least 1": {"k_base": 0},
    "alpha above 0": {"alpha": 0.0},
    "pretrain_steps must be at least 0": {"pretrain_steps": -1},
}


@pytest.mark.parametrize(("match", "settings"), SETTINGS.items())
def test_views_that_make_no_sense_are_refused(match, settings):
    with pytest.raises(ConfigError, match=match):
        mix(**settings)


FITS = {
    "k_diff 2 draws from the synthetic role, which has 0 images": ({}, {"synthetic": None}),
    "k_diff 41 draws from the synthetic role, which has 40 images": ({"k_diff": 41}, {}),
    "pretrain_steps 3 draws from": ({"k_diff": 0, "pretrain_steps": 3}, {"synthetic": None}),
    "k_base 3 views of a record are equal without data.augment": ({}, {"augment": None}),
    "data.encoder fixes one feature per record": ({}, {"augment": None, "encoder": nn.Flatten()}),
}


@pytest.mark.parametrize(("match", "settings"), FITS.items())
def test_data_that_cannot_serve_the_views_are_refused(tmp_path, match, settings):
    module = mix(**settings[0])
    with pytest.raises(ConfigError, match=match) as error:
        fit(tmp_path, module, mix_data(**settings[1]))
    assert "\n" not in str(error.value)
    assert len(module.mechanism.ledger) == 0


def test_features_are_mixed_with_synthetic_features(tmp_path):
    net = nn.Linear(64, 10)
    module = mix(net=net, k_base=1)
    fit(tmp_path, module, mix_data(augment=None, encoder=nn.Flatten()))
    assert module.synthetic.images.dtype == torch.float32
    assert len(module.mechanism.ledger) == STEPS


class TinyEncoder(Encoder):
    def __init__(self):
        conv = nn.Conv2d(3, 8, 3, stride=2)
        for seed, parameter in enumerate(conv.parameters()):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
        net = nn.Sequential(conv, nn.ReLU(), nn.Flatten())
        super().__init__(net, "TinyEncoder", 8, (0.0,) * 3, (1.0,) * 3, "none")


class Pixels(nn.Module):
    """Undoes the normalisation of the digits."""

    def forward(self, images):
        return (images * 0.376 + 0.305).expand(-1, 3, -1, -1)


def test_pixels_are_mixed_before_a_frozen_encoder(tmp_path):
    """Encoding all views of all records at once gives the run of the same layers under vmap."""
    encoder = TinyEncoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    net = EncoderClassifier(encoder, LinearHead(72, 1, 10), (0.305,), (0.376,))
    whole = fit(tmp_path / "encoder", mix(net=net), mix_data())
    plain = nn.Sequential(Pixels(), copy.deepcopy(encoder.net), LinearHead(72, 1, 10))
    parts = fit(tmp_path / "plain", mix(net=plain), mix_data())
    assert not whole.engine.uses_reference
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert net.head.linear.weight.norm() > 0.1
    torch.testing.assert_close(net.head.linear.weight, plain[2].linear.weight, rtol=0, atol=1e-4)
    assert parts.mechanism.ledger.releases == whole.mechanism.ledger.releases == (Release(1.0, 60 / 1240, STEPS),)


def test_the_coins_of_a_record_do_not_depend_on_the_number_of_ranks(small, monkeypatch):
    module, *_ = small(records=1)

    def coins(rank, world, count):
        monkeypatch.setattr(type(module.trainer), "global_rank", rank)
        monkeypatch.setattr(type(module.trainer), "world_size", world)
        return module.record_coins(count, module.mechanism.randomness.numpy("test", 0))

    whole = coins(0, 1, 7)
    assert torch.equal(whole[0::2], coins(0, 2, 4))
    assert torch.equal(whole[1::2], coins(1, 2, 3))


def test_lambda_is_beta_and_partners_are_uniform(seen, tmp_path):
    fit(tmp_path, mix(k_self=40), mix_data())
    coins = torch.cat([coins for _, _, coins, *_ in seen])
    weight, partners = coins[:, -40:].flatten(), coins[:, -120:-40].flatten()
    larger = torch.maximum(weight, 1 - weight)
    # Beta(0.2, 0.2): P[max > 0.9] = 0.674, P[max > 0.99] = 0.422 (dp-mix's own figures), mean 1/2, variance 1 / 5.6
    assert (larger > 0.9).float().mean().item() == pytest.approx(0.674, abs=4 * (0.22 / len(weight)) ** 0.5)
    assert weight.mean().item() == pytest.approx(0.5, abs=4 * (1 / 5.6 / len(weight)) ** 0.5)
    assert weight.var().item() == pytest.approx(1 / 5.6, abs=0.01)
    quantiles = partners.sort().values[:: len(partners) // 20]
    assert all(abs(b - a - 0.05) < 0.01 for a, b in pairwise(quantiles.tolist()[:20]))


TWO = """
import sys
from pathlib import Path
import torch
from tests.methods.runs import fit, weights
from tests.methods.test_dp_mix import mix, mix_data
folder = Path(sys.argv[1])
module = mix(pretrain_steps=3, physical_batch_size=5)
fit(folder, module, mix_data(), strategy="ddp", devices=2)
torch.save((weights(module), module.mechanism.ledger.releases), folder / f"rank{module.trainer.global_rank}.pt")
"""


@pytest.mark.ddp
def test_two_processes_end_where_one_does(tmp_path):
    folder = run_two(tmp_path / "two", script=TWO)
    one = fit(tmp_path / "one", mix(pretrain_steps=3), mix_data())
    first, second = load(folder / "rank0.pt"), load(folder / "rank1.pt")
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], weights(one), rtol=0, atol=1e-5)
    assert first[1] == (Release(1.0, 60 / 1240, STEPS),)
