"""``lightning-dp invert``: what images can be got back from a release of features."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

from lightning_dp.callbacks.meaning import cap_of
from lightning_dp.data import Normalize, Source, load_release
from lightning_dp.data.release import encoder_name
from lightning_dp.errors import ConfigError
from lightning_dp.inversion import Inversion, aligned, likeness, matched, psnr, ssim
from lightning_dp.models import ScatterNet
from lightning_dp.models.linear import feature_vectors
from lightning_dp.privacy import Release
from lightning_dp.privacy.auditing import TradeOff, clopper_pearson
from lightning_dp.privacy.clipping import clip_factors, record_norms

_SHOWN = 8  # records of the picture
_P = 0.05


def invert(
    release: Path,
    source: Source,
    encoder: nn.Module | None = None,
    root: Path = Path("data"),
    degree: int | None = None,
    noise_std: float | None = None,
    mixtures: int = 16,
    candidates: int = 100,
    inversion: Inversion | None = None,
    seed: int = 0,
    output: Path = Path("runs/inversion"),
) -> None:
    """Make mixtures of test records as a release was made, get images back from them, and say how near they come.

    Nothing private is read: test records stand for private ones, so what comes out may be shown. Each mixture holds
    exactly ``degree`` records, which the attack knows, as it knows that its target is there; both are more than the
    release tells. The control is given the images got back from another mixture: what it scores is due to what all
    records have in common.

    Args:
        release: ``release.safetensors`` of mixtures, or its folder.
        source: whose test side is mixed; its training side is not opened.
        encoder: the encoder that the release was made with: ScatterNet, or null for a release of pixels.
        root: folder that holds all data sets; the environment variable LIGHTNING_DP_DATA, if set, replaces it.
        degree: records of a mixture; null for that of the release.
        noise_std: standard deviation of the noise in each value; null for that of the release, 0 for none.
        mixtures: how many. A step on one image of a mixture takes about 3 ms on one CPU core.
        candidates: records among which the one that was there is to be told.
        inversion: settings of the attack; null for the usual ones.
        seed: of records, noise and start.
        output: folder for the table, the figures and the picture.

    Raises:
        ConfigError: the release is not one of mixtures, or the settings contradict it.
    """
    published = load_release(release)
    about = published.about
    if "noise_std" not in about:
        raise ConfigError(f"{release} is no release of mixtures (NeuroMix): invert needs one")
    if encoder_name(encoder) != about["encoder"] or not (encoder is None or isinstance(encoder, ScatterNet)):
        raise ConfigError(
            f"the release was made with encoder {about['encoder']}; invert can use the same ScatterNet only"
        )
    degree = about["degree"] if degree is None else degree
    noise_std = about["noise_std"] if noise_std is None else noise_std
    as_released = (degree, noise_std) == (about["degree"], about["noise_std"])
    if degree < 1 or noise_std < 0 or mixtures < 2 or candidates < 2:
        raise ConfigError("--degree must be 1 or more, --noise_std 0 or more, --mixtures and --candidates 2 or more")
    test = source.load(Path(os.environ.get("LIGHTNING_DP_DATA", root)), train=False, download=False).images
    if len(test) < mixtures * degree + candidates - 1:
        raise ConfigError(f"{len(test)} test records are too few: lower --mixtures, --degree or --candidates")
    features = _Features(encoder, source, about)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(test), generator=generator)
    pixels = test.float() / 255
    records = pixels[order[: mixtures * degree]].view(mixtures, degree, *pixels.shape[1:])
    decoys = pixels[order[mixtures * degree :][: candidates - 1]]
    with torch.no_grad():
        of_decoys = features(decoys)
        observed = torch.stack([features(part).mean(0) for part in records])
        observed += noise_std * torch.randn(observed.shape, generator=generator)
        asked = torch.cat([records[:, :1], decoys.expand(mixtures, *decoys.shape)], 1)
        of_asked = torch.cat([features(records[:, 0])[:, None], of_decoys.expand(mixtures, *of_decoys.shape)], 1)
    features.to(device)
    attack = Inversion() if inversion is None else inversion
    guesses = attack(observed.to(device), degree, features, tuple(pixels.shape[1:]), seed).cpu()

    others = guesses.roll(1, 0)
    figures = {
        "attack": _quality(guesses, records) | {"by_image": _rate(likeness(guesses, asked))},
        "control": _quality(others, records) | {"by_image": _rate(likeness(others, asked))},
    }
    figures["attack"]["by_features"] = _rate(-(of_asked / degree - observed[:, None]).square().sum(2))
    figures["control"]["by_features"] = _rate(-(of_asked / degree - observed.roll(1, 0)[:, None]).square().sum(2))
    report = {
        "guarantee": about["guarantee"],
        "degree": degree,
        "noise_std": noise_std,
        "mixtures": mixtures,
        "candidates": candidates,
        **figures,
        "cap_of_one_mixture": _cap_of_mixture(features.bound, degree, noise_std, candidates),
        "cap_of_the_release": _cap_of_release(release, candidates) if as_released else None,
    }
    text = _table(report)
    output.mkdir(parents=True, exist_ok=True)
    (output / "inversion.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (output / "inversion.md").write_text(text, encoding="utf-8")
    _picture(records, guesses, output / "inversion.png")
    print(text)
    print(f"records, images got back and control, row by row: {output / 'inversion.png'}")


class _Features(nn.Module):
    """Pixels in [0, 1] to the bounded vectors that a release sums; passes gradients back."""

    def __init__(self, encoder: ScatterNet | None, source: Source, about: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.groups, self.max_length, self.feature_norm = about["groups"], about["max_length"], about["feature_norm"]
        self.bound = self.feature_norm if self.max_length is None else min(self.feature_norm, self.max_length)
        self.normalize = Normalize(source.mean, source.std)

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, channels, height, width) -> (n, values)."""
        inputs = self.normalize(255 * pixels)
        if self.encoder is not None:
            inputs = self.encoder.differentiable(inputs)
        if self.groups is not None:
            inputs = F.group_norm(inputs, self.groups)
        vectors = feature_vectors(inputs, self.max_length)
        return vectors * clip_factors(record_norms(vectors), self.feature_norm, "flat")[:, None]


def _quality(guesses: Tensor, records: Tensor) -> dict[str, Any]:
    """Mean and standard error over mixtures of the likeness of matched and aligned images."""
    pairs = [_fitted(ours, theirs) for ours, theirs in zip(guesses, records, strict=True)]
    found: dict[str, Any] = {}
    for name, measure in (("psnr", psnr), ("ssim", ssim)):
        values = torch.stack([measure(ours, theirs).mean() for ours, theirs in pairs]).double()
        found[name] = float(values.mean())
        found[f"{name}_error"] = float(values.std() / len(values) ** 0.5)
    return found


def _fitted(guesses: Tensor, records: Tensor) -> tuple[Tensor, Tensor]:
    return aligned(matched(guesses, records), records), records


def _rate(scores: Tensor) -> dict[str, float]:
    """How often the first of the candidates has the highest score, (mixtures, n), with its 95 % interval."""
    right = int((scores[:, 0] > scores[:, 1:].amax(1)).sum())
    low, high = clopper_pearson(right, len(scores), _P)
    return {"value": right / len(scores), "low": low, "high": high}


def _cap_of_mixture(bound: float, degree: int, noise_std: float, candidates: int) -> float:
    """Most that anyone can tell right of one mixture, of a record known to be one of ``candidates`` and in it.

    To name the right one of n equally likely records is a test at a false positive rate of 1 / n between the record
    and another in its place.
    """
    return TradeOff.of_gdp(2 * bound / (degree * noise_std)).most_power(1 / candidates) if noise_std else 1.0


def _cap_of_release(release: Path, candidates: int) -> float | None:
    """The same of all mixtures of the release together, for a record of which only the candidates are known."""
    card = (release if release.is_dir() else release.parent) / "privacy_card.json"
    if not card.is_file():
        return None
    found = json.loads(card.read_text(encoding="utf-8"))
    releases = [Release(*row) for row in found["releases"]]
    if found["epsilon"] is None or any(part.group for part in releases):
        return None  # a replaced record may change its group, which no budget here is about
    return cap_of(releases, "replace_one").most_power(1 / candidates)


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['guarantee']}",
        "",
        f"{report['mixtures']} mixtures of {report['degree']} test records, noise {report['noise_std']:.4g}; the right "
        f"one of {report['candidates']}: chance {1 / report['candidates']:.4g}",
        "",
        "| | PSNR, dB | SSIM | right, by image | right, by features |",
        "|---|---|---|---|---|",
    ]
    for name in ("attack", "control"):
        found = report[name]
        rates = [
            f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in (found["by_image"], found["by_features"])
        ]
        lines.append(
            f"| {name} | {found['psnr']:.2f} ± {found['psnr_error']:.2f} | {found['ssim']:.3f} ± "
            f"{found['ssim_error']:.3f} | {' | '.join(rates)} |"
        )
    cap = report["cap_of_one_mixture"]
    lines.append(f"| cap of one mixture | - | - | {cap:.4g} | {cap:.4g} |")
    if (cap := report["cap_of_the_release"]) is not None:
        lines.append(f"| cap of the whole release | - | - | {cap:.4g} | {cap:.4g} |")
    return "\n".join(lines) + "\n"


def _picture(records: Tensor, guesses: Tensor, path: Path) -> None:
    """Records, what was got back, and what was got back from another mixture, in three rows."""
    rows = []
    for kind in (records, guesses, guesses.roll(1, 0)):
        fitted = [_fitted(ours, theirs)[0] for ours, theirs in zip(kind, records, strict=True)]
        rows.append(torch.cat(fitted)[:_SHOWN])
    save_image(make_grid(torch.cat(rows), nrow=len(rows[0])), path)
