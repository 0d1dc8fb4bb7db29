"""Digests by which cached features are recognised: of an encoder, and of images."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_parameters", "_buffers"}
_PLAIN = (bool, int, float, complex, str, bytes, Path, torch.dtype, type(None))
_RECORDS_PER_READ = 4096


class Digest:
    """BLAKE2b over values of many kinds, each framed by its type and size; a mapping counts as its keys and values."""

    def __init__(self, key: bytes = b"") -> None:
        self._hash = hashlib.blake2b(digest_size=32, key=key)

    def add(self, value: Any) -> "Digest":
        """Add plain values, tensors, arrays, modules, and mappings and sequences of these; of others the name."""
        if isinstance(value, Tensor):
            self._add_bytes(f"{tuple(value.shape)} {value.dtype}", _bytes_of(value))
        elif isinstance(value, np.ndarray):
            self._add_bytes(f"{value.shape} {value.dtype}", np.ascontiguousarray(value).tobytes())
        elif isinstance(value, nn.Module):
            self._add_module(value)
        elif isinstance(value, Mapping):
            self.add([part for item in value.items() for part in item])
        elif isinstance(value, set | frozenset):
            self.add(sorted(value, key=repr))
        elif isinstance(value, _PLAIN):
            self._add_bytes(type(value).__name__, repr(value).encode())
        elif isinstance(value, Sequence):
            self._add_bytes(f"sequence of {len(value)}", b"")
            for part in value:
                self.add(part)
        else:  # functions and objects: their repr may hold an address
            kind = value if callable(value) and "__qualname__" in dir(value) else type(value)
            self._add_bytes("object", f"{kind.__module__}.{kind.__qualname__}".encode())
        return self

    def hexdigest(self) -> str:
        """The digest, 64 hexadecimal digits."""
        return self._hash.hexdigest()

    def _add_module(self, module: nn.Module) -> None:
        """Weights, buffers (saved or not) and plain attributes of a module and all its parts; not train or eval."""
        for name, part in module.named_modules():
            own = {key: value for key, value in vars(part).items() if key not in _OF_EVERY_MODULE}
            self.add([name, type(part), {key: own[key] for key in sorted(own)}])

    def _add_bytes(self, kind: str, data: bytes | memoryview) -> None:
        self._hash.update(f"{kind} {len(data)}\n".encode())
        self._hash.update(data)


def digest_of_images(images: Tensor) -> str:
    """Digest of uint8 images (n, ...) in their order, 64 hexadecimal digits; a memory map is read in pieces.

    It confirms guesses about private images: it must not be released, nor stand in a file name.
    """
    digest = Digest().add(list(images.shape))
    for start in range(0, len(images), _RECORDS_PER_READ):
        digest.add(images[start : start + _RECORDS_PER_READ])
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's values as bytes, whatever its device, layout and dtype."""
    array: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)
