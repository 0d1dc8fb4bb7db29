"""A network with one weight of its own for each canary: the sharpest test that a training run can be given."""

from typing import final

import torch
from torch import Tensor, nn

from lightning_dp.errors import ConfigError

_INDEX_BITS = 16
_MARKER = tuple((i * i + 3 * i) % 7 % 2 for i in range(48))  # ends every code; no image has it by chance
_LENGTH = _INDEX_BITS + len(_MARKER)
_AMPLITUDE = 1e4  # over the gradient of all other weights, so that a clipped canary is this one coordinate
_LEAST_LOG = -60.0  # of a probability; its inverse times the amplitude is far below the largest float32


def canary_codes(count: int, shape: tuple[int, ...], images: bool) -> Tensor:
    """Inputs that `DiracCanaries` knows, one for each number below ``count``.

    Args:
        count: of canaries, at most 65,536.
        shape: of one input; the code is in its first 64 values.
        images: uint8 with 0 and 255, else float32 with 0 and 1.

    Returns:
        Tensor (count, *shape).

    Raises:
        ConfigError: the inputs are too small, or ``count`` is too large.
    """
    values = torch.Size(shape).numel()
    if values < _LENGTH or count > 2**_INDEX_BITS:
        raise ConfigError(f"dirac canaries need inputs of {_LENGTH} values or more, and are at most {2**_INDEX_BITS}")
    index = torch.arange(count)[:, None] >> torch.arange(_INDEX_BITS) & 1
    bits = torch.cat([index, torch.tensor(_MARKER).expand(count, -1)], dim=1)
    codes = torch.zeros(count, values)
    codes[:, :_LENGTH] = bits.float()
    codes = codes.view(count, *shape)
    return (255 * codes).to(torch.uint8) if images else codes


@final
class DiracCanaries(nn.Module):
    """``net``, and a weight for each canary whose gradient is that canary's alone; the logits are those of ``net``.

    A canary's clipped gradient is (nearly) the clip norm in one coordinate that no other record touches, so the noisy
    sum shows in it whether the canary was in the batch, behind the noise and nothing else (Nasr et al. 2023, recalled).

    Args:
        net: classifier, inputs (n, ...) -> logits (n, classes). Labels of canaries are not 0.
        canaries: how many, as in the data.

    Example:
        >>> net = DiracCanaries(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 5)
        >>> codes, labels = canary_codes(5, (1, 8, 8), images=False), torch.tensor([1, 2, 1, 2, 1])
        >>> losses = nn.functional.cross_entropy(net(codes), labels, reduction="none")
        >>> torch.autograd.grad(losses[2], net.canaries)[0].round().tolist()
        [0.0, 0.0, 10000.0, 0.0, 0.0]
    """

    def __init__(self, net: nn.Module, canaries: int) -> None:
        super().__init__()
        self.net = net
        self.canaries = nn.Parameter(torch.zeros(canaries))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (n, classes) of inputs (n, ...)."""
        logits: Tensor = self.net(inputs)
        own = self.canaries - self.canaries.detach()  # zero, with a gradient
        # the gradient of the loss in logit 0 is its probability, as no canary has label 0; divided out, it is constant
        slope = torch.exp(-logits.detach().log_softmax(1)[:, 0].clamp(min=_LEAST_LOG))
        moved = logits[:, 0] + slope.to(logits.dtype) * (self._which(inputs).to(logits.dtype) @ own.to(logits.dtype))
        return torch.cat([moved[:, None], logits[:, 1:]], dim=1)

    def _which(self, inputs: Tensor) -> Tensor:
        """Amplitude at the canary that an input is, (n, canaries), else 0; unchanged by normalisation."""
        code = inputs.flatten(1)[:, :_LENGTH]
        middle = (code.amax(1, keepdim=True) + code.amin(1, keepdim=True)) / 2
        bits = code > middle
        marked = (bits[:, _INDEX_BITS:] == torch.tensor(_MARKER, device=inputs.device).bool()).all(1)
        number = (bits[:, :_INDEX_BITS].long() << torch.arange(_INDEX_BITS, device=inputs.device)).sum(1)
        match = (number[:, None] == torch.arange(len(self.canaries), device=inputs.device)) & marked[:, None]
        return match.to(inputs.dtype) * _AMPLITUDE
