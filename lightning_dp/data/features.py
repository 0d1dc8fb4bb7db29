"""Features computed once: files that are memory-mapped, shared by runs and processes.

A file of features of private records is private data. It is readable by its owner only, and its name is a digest under
a secret key that lies in the same folder: without that key, a name cannot be compared with a guessed data set.
"""

import fcntl
import hashlib
import hmac
import io
import logging
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from lightning_dp.data.encoding import encode, feature_shape
from lightning_dp.data.fingerprint import Digest, digest_of_images
from lightning_dp.data.transforms import Normalize
from lightning_dp.errors import ConfigError

FeatureDtype = Literal["float32", "float16", "bfloat16"]
_FORMAT = "lightning_dp features 1"  # change it when the same encoder gives other features
_KEY_BYTES = 32
_CHECKSUM_BYTES = 32
# NumPy has no bfloat16: its bits are kept as int16
_STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.int16}
_LOG = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class FeatureCache:
    """Features by encoder (weights, settings), normalisation, precision and images; each computed once.

    Guarantee: a file appears whole or not at all, is checked before it is used (a damaged one is made again), and is
    made by one process while the others wait for it. A process that dies lets go of its lock, and leaves nothing that
    could be taken for features.

    Args:
        folder: where the files are; made with access for its owner only.
        dtype: in which features are kept. They are served as float32 by every role.
    """

    folder: Path
    dtype: FeatureDtype = "float32"

    def features(
        self, images: Tensor, encoder: nn.Module, normalize: Normalize, batch_size: int, device: torch.device
    ) -> Tensor:
        """Features of uint8 images (n, channels, height, width): mapped from their file, or first computed.

        Args:
            images: in any number, possibly memory-mapped.
            encoder: (n, channels, height, width) -> (n, ...), each record by itself.
            normalize: applied before the encoder.
            batch_size: images per call of the encoder; performance only.
            device: where the encoder is run.

        Returns:
            Features (n, ...) of ``dtype``, memory-mapped; writing to them does not change the file.

        Raises:
            ConfigError: the folder cannot be written to, a feature does not fit ``dtype``, or a record's features
                depend on the others of its batch.
        """
        encoder.float().eval()
        with _named_folder(self.folder):
            key = self._secret_key()
            name = Digest(key).add([_FORMAT, self.dtype, encoder, normalize.mean, normalize.std])
            path = self.folder / f"{name.add(digest_of_images(images)).hexdigest()[:32]}.npy"
            with _locked(path.with_suffix(".lock")):
                if not _is_whole(path, key):
                    shape = feature_shape(encoder, images.shape[1:], normalize, device)
                    batches = encode(images, encoder, normalize, batch_size, device)
                    _write(path, key, self._pieces(batches, (len(images), *shape)))
        array = np.load(path, mmap_mode="c")  # copy-on-write: PyTorch warns about tensors over read-only memory
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if self.dtype == "bfloat16" else tensor

    def _pieces(self, batches: Iterable[Tensor], shape: tuple[int, ...]) -> Iterator[bytes]:
        """The bytes of the file: NumPy's header, then the batches."""
        stored, header = np.dtype(_STORED[self.dtype]), io.BytesIO()
        layout = {"descr": np.lib.format.dtype_to_descr(stored), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, layout)
        return chain([header.getvalue()], (self._rounded(batch).numpy().tobytes() for batch in batches))

    def _rounded(self, batch: Tensor) -> Tensor:
        if self.dtype == "float32":
            return batch
        rounded = batch.to(torch.float16 if self.dtype == "float16" else torch.bfloat16)
        if bool((rounded.isinf() & batch.isfinite()).any()):
            raise ConfigError(f"data.feature_dtype {self.dtype} cannot hold a feature as large as these: use float32")
        return rounded.view(torch.int16) if self.dtype == "bfloat16" else rounded

    def _secret_key(self) -> bytes:
        """The folder's key; made on first use."""
        path = self.folder / "key"
        with _locked(path):
            key = path.read_bytes()
            if len(key) != _KEY_BYTES:
                key = secrets.token_bytes(_KEY_BYTES)
                path.write_bytes(key)
        return key


@contextmanager
def _named_folder(folder: Path) -> Iterator[None]:
    """Make the folder; say in one line which it is if it cannot be used."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(f"{folder} cannot hold features ({error}): set data.cache to a folder with room") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, which the operating system takes back from a process that dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("another process computes the same features: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_whole(path: Path, key: bytes) -> bool:
    """Tell whether a file of features is there and as it was written; a damaged one is reported."""
    if not path.exists():
        return False
    size = path.stat().st_size - _CHECKSUM_BYTES
    if size > 0:
        mapped: Any = np.memmap(path, dtype=np.uint8, mode="r")
        data = memoryview(mapped)
        checksum = hashlib.blake2b(data[:size], digest_size=_CHECKSUM_BYTES, key=key).digest()
        if hmac.compare_digest(checksum, data[size:]):
            return True
    _LOG.warning("cached features %s are damaged: they are computed again", path)
    return False


def _write(path: Path, key: bytes, pieces: Iterable[bytes]) -> None:
    """Write a file and its checksum under another name, and rename it when it is complete and on disk."""
    partial = path.with_suffix(".partial")
    checksum = hashlib.blake2b(digest_size=_CHECKSUM_BYTES, key=key)
    try:
        partial.unlink(missing_ok=True)  # of a process that was killed: the lock is ours now
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            for piece in pieces:
                file.write(piece)
                checksum.update(piece)
            file.write(checksum.digest())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
