"""``lightning-dp generate``: fill the synthetic role's pool, without opening any data set.

Everything here is a function of class names, numbers and a public model. A pool that was interrupted is finished by the
same command; images are written under a temporary name and renamed, so a file that exists is complete.
"""

import json
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from lightning_dp.data.pool import MANIFEST, read_manifest
from lightning_dp.errors import ConfigError
from lightning_dp.generators import Ask, Generator

_FORMAT = 1
_PREVIEW = 10  # images per class, and classes, in the preview


def generate(
    out: Path,
    generator: Generator,
    classes: list[str],
    per_class: int,
    seed: int = 0,
    batch_size: int = 32,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Write a labelled pool of synthetic images: ``<index>_<label>.png``, ``manifest.json`` and ``preview/``.

    The same command again finishes a pool that was interrupted.

    Args:
        out: folder of the pool.
        generator: TextToImage or TrainedDiffusion.
        classes: names of the classes; the label of a class is its place in the list. Public knowledge.
        per_class: images of every class; chosen without looking at private class counts.
        seed: image i of a class depends on this, the class and i.
        batch_size: images made at once; memory and speed only.
        device: auto takes a CUDA device if there is one.

    Raises:
        ConfigError: a number is out of range, ``out`` holds another pool or other files, or the model cannot be read.
    """
    if not classes or len(set(classes)) < len(classes):
        raise ConfigError("--classes must name every class once: correct the list")
    if per_class < 1 or batch_size < 1:
        raise ConfigError("--per_class and --batch_size must be at least 1: correct them")
    # through JSON, so that it compares with a manifest that was read
    manifest = json.loads(json.dumps(_manifest(generator, classes, per_class, seed)))
    _check_folder(out, manifest)
    asks = [Ask(label, name, index, seed) for label, name in enumerate(classes) for index in range(per_class)]
    if any(not _path(out, ask).is_file() for ask in asks):
        generator.load(_device(device))
    _write_manifest(out, manifest)
    _fill(out, generator, asks, batch_size)
    grid = save_preview(out, len(classes), per_class)
    print(f"{len(asks)} images in {out}; preview: {grid}, or tensorboard --logdir {grid.parent}")


def _manifest(generator: Generator, classes: Sequence[str], per_class: int, seed: int) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "classes": list(classes),
        "per_class": per_class,
        "seed": seed,
        "generator": generator.describe(classes),
    }


def _check_folder(out: Path, manifest: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but a pool of the same manifest."""
    there = read_manifest(out)
    # killed just before its manifest was there, a run leaves the draft of it
    if there is None and out.exists() and (not out.is_dir() or {*out.iterdir()} - {_draft(out / MANIFEST)}):
        raise ConfigError(f"--out {out} holds other files: choose a new folder")
    if there is not None and there != manifest:
        before, now = ({**each, **each["generator"], "generator": None} for each in (there, manifest))
        other = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        raise ConfigError(f"--out {out} holds a pool made with other {', '.join(other)}: choose a new folder")


def _write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written to ({error}): choose another folder") from error


def _fill(out: Path, generator: Generator, asks: Sequence[Ask], batch_size: int) -> None:
    """Make what is missing. Batches are cut alike in every run, so that a resumed one repeats them to the last bit."""
    with tqdm(total=len(asks), desc="generating", unit="image") as bar:
        for start in range(0, len(asks), batch_size):
            batch = asks[start : start + batch_size]
            missing = [place for place, ask in enumerate(batch) if not _path(out, ask).is_file()]
            images = generator.sample(batch) if missing else None
            for place in missing:
                assert images is not None
                _write(_path(out, batch[place]), _png(images[place]))
            bar.update(len(batch))


def save_preview(out: Path, num_classes: int, per_class: int) -> Path:
    """Ten images of each of the first ten classes, one class a row: a PNG, and a TensorBoard event beside it.

    Returns:
        Path of the PNG.
    """
    columns = min(per_class, _PREVIEW)
    shown = [
        _path(out, Ask(label, "", index, 0)) for label in range(min(num_classes, _PREVIEW)) for index in range(columns)
    ]
    images = torch.stack([pil_to_tensor(Image.open(path)) for path in shown])
    grid = make_grid(images, nrow=columns)
    folder = out / "preview"
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("events.out.tfevents.*"):
        stale.unlink()
    with SummaryWriter(str(folder)) as writer:
        writer.add_image("pool/samples", grid, 0)
    _write(folder / "grid.png", _png(grid))
    return folder / "grid.png"


def _path(out: Path, ask: Ask) -> Path:
    return out / f"{ask.index:06d}_{ask.label}.png"


def _png(image: Tensor) -> bytes:
    """A uint8 image (channels, height, width) as the bytes of a PNG file."""
    buffer = BytesIO()
    to_pil_image(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    draft = _draft(path)
    draft.write_bytes(content)
    os.replace(draft, path)


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.draft")


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device; set --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
