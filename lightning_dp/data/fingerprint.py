"""Digests by which cached features are recognised: of an encoder, and of images."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_dp.errors import ConfigError

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_parameters", "_buffers"}
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, type(None))
_RECORDS_PER_READ = 4096


class Digest:
    """BLAKE2b over values of many kinds, each framed by its type and size; a mapping counts as its keys and values."""

    def __init__(self, key: bytes = b"") -> None:
        self._hash = hashlib.blake2b(digest_size=32, key=key)
        self._met: dict[int, tuple[int, Any]] = {}  # objects by id, kept so that no id is used twice

    def add(self, value: Any) -> "Digest":
        """Add a value with all that it holds; of a class its name, of a function its code and what is bound to it.

        Raises:
            ConfigError: a module has forward hooks, or an object does not say what it holds (a lock, a callback).
        """
        if isinstance(value, Tensor):
            self._add_bytes(f"{tuple(value.shape)} {value.dtype}", _bytes_of(value))
        elif isinstance(value, np.ndarray):
            self._add_bytes(f"{value.shape} {value.dtype}", np.ascontiguousarray(value).tobytes())
        elif isinstance(value, nn.Module):
            self._add_module(value)
        elif type(value) in (dict, OrderedDict):
            self.add([part for item in value.items() for part in item])
        elif type(value) in (set, frozenset):
            self.add(sorted(value, key=repr))
        elif type(value) in _PLAIN:
            self._add_bytes(type(value).__name__, repr(value).encode())
        elif type(value) in (list, tuple):
            self._add_bytes(f"sequence of {len(value)}", b"")
            for part in value:
                self.add(part)
        elif isinstance(value, type | ModuleType):
            self._add_bytes("name", _name_of(value).encode())
        else:
            self._add_object(value)
        return self

    def hexdigest(self) -> str:
        """The digest, 64 hexadecimal digits."""
        return self._hash.hexdigest()

    def _add_module(self, module: nn.Module) -> None:
        """Weights, buffers (saved or not) and plain attributes of a module and all its parts; not train or eval."""
        if self._met_before(module):
            return
        for name, part in module.named_modules():
            if part._forward_hooks or part._forward_pre_hooks:
                raise ConfigError(
                    f"data.encoder has a forward hook on {name or 'itself'} ({type(part).__name__}), which cached "
                    "features cannot be recognised by: remove it, or do its work in a forward function"
                )
            own = {key: value for key, value in vars(part).items() if key not in _OF_EVERY_MODULE}
            self.add([name, type(part), {key: own[key] for key in sorted(own)}])

    def _add_object(self, value: Any) -> None:
        """What makes an object what it is; never its repr, which may hold an address."""
        if self._met_before(value):
            return
        try:
            held = _held_by(value)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"data.encoder holds a {_name_of(type(value))}, which cached features cannot be recognised by "
                f"({reason}): keep plain values, tensors and modules in it"
            ) from error
        self._add_bytes("object", _name_of(type(value)).encode())
        self.add(held)

    def _met_before(self, value: Any) -> bool:
        """Tell whether an object was added before; then its number stands for it, so that rings come to an end."""
        met = id(value) in self._met
        number, _ = self._met.setdefault(id(value), (len(self._met), value))
        if met:
            self._add_bytes("again", str(number).encode())
        return met

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


def _held_by(value: Any) -> list[Any]:
    """The parts of a function, or of an object as ``pickle`` would keep it."""
    if isinstance(value, FunctionType):
        bound = [cell.cell_contents for cell in value.__closure__ or ()]
        return [_name_of(value), value.__code__, value.__defaults__, value.__kwdefaults__, bound]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    parts = value.__reduce_ex__(4)
    if isinstance(parts, str):  # a constant of its module
        return [parts]
    return [list(part) if isinstance(part, Iterator) else part for part in parts]


def _name_of(value: Any) -> str:
    """Full name of a module, class or function."""
    return value.__name__ if isinstance(value, ModuleType) else f"{value.__module__}.{value.__qualname__}"


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's values as bytes, whatever its device, layout and dtype."""
    array: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)
