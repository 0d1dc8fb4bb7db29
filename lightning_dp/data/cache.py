"""Image files decoded once into a memory-mapped array."""

import hashlib
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from lightning_dp.errors import ConfigError


def decode_cached(files: Sequence[Path], image_size: int, folder: Path, name: str, channels: int = 3) -> Tensor:
    """Decode image files, or map the array in which an earlier call left them.

    The array is written under a temporary name and renamed when it is complete, so neither an interruption nor two
    processes at work at once can leave a half-written file behind.

    Args:
        files: images in any format and size that PIL reads.
        image_size: the short side is resized to this many pixels, then the centre square is kept.
        folder: where the arrays are kept.
        name: first part of the array's name; the rest changes with the list of files, their sizes and times.
        channels: 3 for RGB, 1 for grey.

    Returns:
        uint8 of shape (n, channels, image_size, image_size), memory-mapped; writing to it does not change the file.

    Raises:
        ConfigError: a file cannot be decoded, or the folder not be written to.
    """
    kind = f"{name}-{image_size}" if channels == 3 else f"{name}-{image_size}-grey"
    path = folder / f"{kind}-{_fingerprint(files)}.npy"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f"{path.stem}.{secrets.token_hex(8)}.tmp"
            temporary.touch()
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written to ({error}): set data.root to a folder of yours") from error
        try:
            _decode_all(files, (channels, image_size, image_size), temporary, name)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    # copy-on-write, because PyTorch warns about (and could be crashed by) tensors over read-only memory
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _fingerprint(files: Sequence[Path]) -> str:
    """Hash of the files' names, sizes and modification times."""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        status = file.stat()
        digest.update(f"{file.parent.name}/{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _decode_all(files: Sequence[Path], shape: tuple[int, int, int], path: Path, name: str) -> None:
    """Write the decoded files, in order, as one .npy array."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(files), *shape))

    def store(index: int) -> None:
        array[index] = _decode(files[index], shape)

    # threads serve: PIL releases the interpreter lock while it decodes and resizes
    with ThreadPoolExecutor() as pool:
        done = pool.map(store, range(len(files)))
        for _ in tqdm(done, desc=f"decoding {name}", total=len(files), leave=False):
            pass
    array.flush()


def _decode(file: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """One image as uint8 (channels, image_size, image_size)."""
    try:
        with Image.open(file) as image:
            fitted = ImageOps.fit(
                image.convert("RGB" if shape[0] == 3 else "L"), shape[1:], method=Image.Resampling.BICUBIC
            )
    except (OSError, ValueError, SyntaxError) as error:  # PIL reports a broken PNG as SyntaxError
        raise ConfigError(f"{file} cannot be decoded ({error}): repair or remove it") from error
    return np.asarray(fitted).reshape(*shape[1:], shape[0]).transpose(2, 0, 1)
