"""Networks and batches of the step-time table."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vit_b_16

from lightning_dp.models import CIFARTanhCNN, WideResNet


class Positions(nn.Module):
    """Adds a learned position to each of ``count`` tokens of ``width``."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.values = nn.Parameter(0.02 * torch.randn(1, count, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Add to tokens (n, count, width)."""
        return tokens + self.values


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) -> the same shape."""
        qkv = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class ViT(nn.Module):
    """Vision transformer of a size that Opacus takes as well: no class token, positions in a module of their own."""

    def __init__(self, patch: int = 4, width: int = 192, depth: int = 6, heads: int = 3, size: int = 32) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = Positions((size // patch) ** 2, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, size, size) -> logits (n, 10)."""
        tokens = self.blocks(self.positions(self.embed(images).flatten(2).transpose(1, 2)))
        logits: Tensor = self.head(self.norm(tokens).mean(1))
        return logits


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Args:
        make: the network.
        shape: of one record.
        batch: records of a step.
        classes: number of logits.
        bf16: forward passes in bfloat16 by autocast.
        cuda: too large for a CPU.
        opacus: whether Opacus takes the network as it is.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    classes: int = 10
    bf16: bool = False
    cuda: bool = False
    opacus: bool = True


CASES = {
    "wrn": Case(lambda: WideResNet(16, 4), (3, 32, 32), 64),
    "wrn_ws": Case(lambda: WideResNet(16, 4, weight_standardization=True), (3, 32, 32), 64),
    "cnn": Case(CIFARTanhCNN, (3, 32, 32), 256),
    "vit": Case(ViT, (3, 32, 32), 64),
    "probe": Case(lambda: nn.Linear(2048, 100), (2048,), 1024, 100),
    "wrn_bf16": Case(lambda: WideResNet(16, 4), (3, 32, 32), 64, bf16=True, cuda=True),
    "wrn28_10": Case(lambda: WideResNet(28, 10), (3, 32, 32), 64, bf16=True, cuda=True),
    # Opacus' validator rejects nn.MultiheadAttention
    "vit_b16": Case(lambda: vit_b_16(num_classes=10), (3, 224, 224), 64, bf16=True, cuda=True, opacus=False),
}
