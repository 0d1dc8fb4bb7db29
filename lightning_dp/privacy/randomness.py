"""Where every coin of a private run comes from: one 256-bit key, and one stream per purpose and step.

A fresh key comes from the operating system. It is never stored or logged: amplification by sampling needs the batches
to stay unknown, and the noise must not be reproducible. A configured seed replaces the key for tests and research.

PyTorch's CPU generator is not used: it keeps only the low 32 bits of its seed, so streams of different steps collide
(with probability 1/2 after 77,000 steps) and two equal noise vectors cancel.
"""

import hashlib
import secrets
from dataclasses import dataclass, field

import numpy as np
import torch

from lightning_dp.errors import ConfigError

_KEY_BYTES = 32


@dataclass(frozen=True)
class Randomness:
    """Independent random streams, addressed by purpose and step.

    Guarantee: with ``seeded`` false the key is 256 fresh bits of the operating system's generator, and streams of
    different (purpose, step) are keyed by BLAKE2b used as a pseudorandom function, so none repeats another.

    Args:
        key: 32 secret bytes.
        secure: draw from ChaCha20, a cryptographic generator, instead of PCG64DXSM (CPU) and Philox (CUDA).
        seeded: the key came from a configured seed: for tests and research, not for a release.

    Example:
        >>> coins = Randomness.from_seed(0)
        >>> bool(coins.numpy("noise", 3).random() == coins.numpy("noise", 3).random())
        True
        >>> bool(coins.numpy("noise", 3).random() == coins.numpy("noise", 4).random())
        False
    """

    key: bytes = field(repr=False)
    secure: bool = False
    seeded: bool = False

    @classmethod
    def from_seed(cls, seed: int | None, secure: bool = False) -> "Randomness":
        """Streams of ``seed``, or of a fresh operating-system key if ``seed`` is None."""
        if seed is None:
            return cls(secrets.token_bytes(_KEY_BYTES), secure, seeded=False)
        return cls(hashlib.blake2b(f"seed {seed}".encode(), digest_size=_KEY_BYTES).digest(), secure, seeded=True)

    def numpy(self, purpose: str, step: int) -> np.random.Generator:
        """Generator of the stream (purpose, step), on the CPU.

        Raises:
            ConfigError: ``secure`` is set and randomgen is not installed.
        """
        digest = self._digest(purpose, step)
        if not self.secure:
            return np.random.Generator(np.random.PCG64DXSM(int.from_bytes(digest, "little")))
        try:
            from randomgen import ChaCha
        except ImportError as error:
            raise ConfigError(
                "privacy.secure needs randomgen's ChaCha generator: pip install 'lightning_dp[secure]'"
            ) from error
        return np.random.Generator(ChaCha(key=int.from_bytes(digest, "little"), rounds=20))

    def torch_seed(self, purpose: str, step: int) -> int:
        """64 bits of the stream (purpose, step), for coins that PyTorch's own modules draw (dropout)."""
        return int.from_bytes(self._digest(purpose, step)[:8], "little") - 2**63

    def cuda(self, purpose: str, step: int, device: torch.device) -> torch.Generator:
        """Philox generator of the stream (purpose, step) on a CUDA device; all 64 bits of its seed count."""
        return torch.Generator(device).manual_seed(self.torch_seed(purpose, step))

    def describe(self) -> str:
        """One line for the privacy card."""
        if self.seeded:
            return "fixed seed: NOT FOR RELEASE, whoever knows the seed can remove the noise"
        if self.secure:
            return "ChaCha20 keyed by the operating system (cryptographic); Gaussians after Holohan and Braghin 2021"
        return "PCG64DXSM (CPU) or Philox (CUDA) keyed by the operating system (statistical, not cryptographic)"

    def _digest(self, purpose: str, step: int) -> bytes:
        message = f"{purpose} {step}".encode()
        return hashlib.blake2b(message, digest_size=_KEY_BYTES, key=self.key, person=b"lightning_dp").digest()
