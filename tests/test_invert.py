"""Inversion of features: it works where it can, the control does not, noise stops it, nothing private is read."""

import json
import math

import pytest
import torch
from scipy.stats import norm

from lightning_dp.cli import main
from lightning_dp.data import Digits, Published
from lightning_dp.inversion import Inversion, aligned, likeness, matched, psnr, ssim, total_variation
from lightning_dp.invert import _cap_of_mixture

ABOUT = {
    "kind": "features",
    "shape": [1, 8, 8],
    "method": "NeuroMix",
    "encoder": None,
    "groups": None,
    "max_length": 1.0,
    "feature_norm": 1.0,
    "degree": 1,
    "noise_std": 0.0,
    "guarantee": "epsilon 1 at delta 1e-5",
}


@pytest.fixture
def release(tmp_path):
    def make(**changes):
        Published(torch.zeros(3, 64), torch.zeros(3, 10), {**ABOUT, **changes}).save(tmp_path / "release")
        return tmp_path / "release"

    return make


def run(tmp_path, path, *words):
    main(
        [
            *("invert", f"--release={path}", "--source=Digits", f"--output={tmp_path / 'out'}", "--candidates=20"),
            *("--mixtures=20", "--inversion.steps=300", *words),
        ]
    )
    return json.loads((tmp_path / "out/inversion.json").read_text())


def test_single_records_come_back_and_the_control_does_not(release, tmp_path, monkeypatch, capsys):
    opened, original = [], Digits.load
    monkeypatch.setattr(
        Digits,
        "load",
        lambda self, root, train, download: (opened.append((train, root)), original(self, root, train, download))[1],
    )
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(tmp_path / "elsewhere"))
    found = run(tmp_path, release())
    assert opened == [(False, tmp_path / "elsewhere")]
    assert found["attack"]["psnr"] > found["control"]["psnr"] + 8
    assert found["attack"]["ssim"] > 0.9 > found["control"]["ssim"] + 0.4
    for way in ("by_image", "by_features"):
        assert found["attack"][way]["low"] > 0.8
        assert found["control"][way]["high"] < 0.4
    assert found["cap_of_one_mixture"] == 1.0
    assert found["cap_of_the_release"] is None
    assert (tmp_path / "out/inversion.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "out/inversion.png").stat().st_size > 500


def test_mixtures_are_harder_and_noise_brings_all_within_the_cap(release, tmp_path):
    pair = run(tmp_path, release(), "--degree=2")
    noisy = run(tmp_path, release(degree=2, noise_std=1.0))
    assert pair["control"]["ssim"] + 0.1 < pair["attack"]["ssim"] < 0.9
    assert noisy["cap_of_one_mixture"] == pytest.approx(norm.cdf(norm.ppf(1 / 20) + 1.0), rel=1e-4)
    for way in ("by_image", "by_features"):
        assert noisy["attack"][way]["low"] < noisy["cap_of_one_mixture"] < pair["attack"]["by_features"]["value"]
    assert noisy["noise_std"] == 1.0
    assert noisy["degree"] == 2


def test_the_cap_bounds_the_best_guess_between_far_records():
    """Records at the ends of as many axes, as long as they may be: the most likely one is right as often as allowed."""
    n, degree, std, trials = 20, 2, 0.5, 40_000
    generator = torch.Generator().manual_seed(0)
    values = std * torch.randn(trials, n, generator=generator)
    values[:, 0] += 1 / degree
    rate = float((values.argmax(1) == 0).double().mean())
    cap = _cap_of_mixture(1.0, degree, std, n)
    assert 0.2 < rate < cap
    assert _cap_of_mixture(1.0, degree, 0.0, n) == 1.0


def test_the_cap_of_the_release_is_that_of_its_card(release, tmp_path):
    path = release(noise_std=1.0)
    card = {"epsilon": 1.0, "releases": [[4.0, 1.0, 1]]}
    (path / "privacy_card.json").write_text(json.dumps(card))
    found = run(tmp_path, path, "--inversion.steps=2")
    assert found["cap_of_the_release"] == pytest.approx(norm.cdf(norm.ppf(1 / 20) + 2 / 4.0), rel=0.01)
    assert run(tmp_path, path, "--inversion.steps=2", "--noise_std=0")["cap_of_the_release"] is None
    assert run(tmp_path, path, "--inversion.steps=2", "--degree=2")["cap_of_the_release"] is None
    (path / "privacy_card.json").write_text(json.dumps({"epsilon": 1.0, "releases": [[4.0, 1.0, 1, "class 0"]]}))
    assert run(tmp_path, path, "--inversion.steps=2")["cap_of_the_release"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--degree=0"], "--degree must be 1 or more"),
        (["--mixtures=400"], "test records are too few"),
        (["--encoder=ScatterNet", "--encoder.image_size=8"], "made with encoder None"),
    ],
)
def test_refusals(release, tmp_path, words, message):
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, release(), *words)


def test_a_release_of_images_is_refused(tmp_path):
    about = {"kind": "images", "method": "PSG", "encoder": None, "guarantee": "-"}
    Published(torch.zeros(3, 1, 8, 8), torch.zeros(3, 10), about).save(tmp_path)
    with pytest.raises(SystemExit, match="no release of mixtures"):
        run(tmp_path, tmp_path)


def test_scatter_features_pass_gradients_that_are_right():
    pytest.importorskip("kymatio")
    from lightning_dp.models import ScatterNet

    net = ScatterNet(8).double()
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: net.differentiable(x).square().sum(), (images,))
    plain = torch.zeros(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(net.differentiable(plain).sum(), [plain])
    assert slope.isfinite().all()
    assert not net(images).requires_grad
    assert torch.equal(net(images), net.differentiable(images).detach())


def test_measures():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 1, 8, 8, generator=generator)
    assert psnr(images, images).tolist() == pytest.approx([100.0] * 3)
    assert psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.1)).item() == pytest.approx(20.0)
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert total_variation(torch.ones(2, 1, 4, 4)).tolist() == [0.0, 0.0]
    shuffled = 1 - 0.5 * images[[2, 0, 1]]
    assert torch.equal(matched(shuffled, images), shuffled[[1, 2, 0]])
    assert torch.allclose(aligned(matched(shuffled, images), images), images, atol=1e-5)
    scores = likeness(shuffled[None, :2], images[None])
    assert scores[0, [0, 2]].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert scores[0, 1] < 0.5


def test_the_attack_is_a_function_of_its_seed_and_does_not_depend_on_how_it_is_split():
    observed = torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    features = lambda images: images.flatten(1)  # noqa: E731
    whole, split = (Inversion(steps=20, images_at_once=size)(observed, 2, features, (1, 4, 4), 3) for size in (8, 2))
    assert torch.allclose(whole, split, atol=1e-6)
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert math.isclose(float((whole.mean(1).flatten(1) - observed).abs().max()), 0, abs_tol=0.2)
