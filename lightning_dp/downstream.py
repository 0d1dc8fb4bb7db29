"""``lightning-dp downstream``: what a release of images teaches to networks of other kinds."""

import os
import statistics
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from lightning_dp.data import Normalize, Source, load_release
from lightning_dp.errors import ConfigError
from lightning_dp.methods import ReleaseTraining
from lightning_dp.methods.release_training import check_resettable
from lightning_dp.models import small_networks


def downstream(
    release: Path,
    source: Source,
    root: Path = Path("data"),
    networks: list[str] | None = None,
    training: ReleaseTraining | None = None,
    repeats: int = 3,
    output: Path | None = None,
) -> None:
    """Train networks on a release of images, test them on real ones, and print a table. Nothing private is read.

    Args:
        release: ``release.safetensors``, or its folder.
        source: whose test side is the test; its training side is not opened.
        root: folder that holds all data sets; the environment variable LIGHTNING_DP_DATA, if set, replaces it.
        networks: some of ConvNet, LeNet, AlexNet, VGG11, ResNet18, MLP; null for all.
        training: how they are trained; null for that of Private Set Generation.
        repeats: networks of each kind, from different weights.
        output: Markdown file for the table, besides the screen.

    Raises:
        ConfigError: there is no such release or network, or it is one of features.
    """
    published = load_release(release)
    if published.about["kind"] != "images":
        raise ConfigError(f"{release} holds {published.about['kind']}, not images: lightning-dp fit trains heads on it")
    if repeats < 1:
        raise ConfigError(f"--repeats {repeats} must be at least 1")
    channels, size, classes = published.inputs.shape[1], published.inputs.shape[2], published.targets.shape[1]
    known = small_networks(channels, size, classes)
    if unknown := [name for name in networks or [] if name not in known]:
        raise ConfigError(f"--networks {unknown[0]} is not among {', '.join(known)}: correct it")
    test = source.load(Path(os.environ.get("LIGHTNING_DP_DATA", root)), train=False, download=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = Normalize(source.mean, source.std)(test.images)
    recipe = ReleaseTraining() if training is None else training
    lines = ["| network | test accuracy, % | runs |", "|---|---|---|"]
    for name in tqdm(networks or list(known), desc="networks"):
        net = known[name].to(device)
        check_resettable(net)
        found = []
        for seed in range(repeats):
            recipe(net, published.inputs.to(device), published.targets.to(device), seed)
            found.append(100 * _accuracy(net, images, test.labels, device))
        error = statistics.stdev(found) / repeats**0.5 if repeats > 1 else float("nan")
        lines.append(f"| {name} | {statistics.mean(found):.2f} ± {error:.2f} | {repeats} |")
    text = "\n".join([f"{published.about['method']}: {published.about['guarantee']}", "", *lines]) + "\n"
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


@torch.no_grad()
def _accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, device: torch.device) -> float:
    guesses = torch.cat([net(part.to(device)).argmax(1).cpu() for part in torch.split(images, 500)])
    return float((guesses == labels).double().mean())
