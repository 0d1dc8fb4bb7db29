"""A look at whether a network treats every record by itself."""

from collections.abc import Callable

import torch
from torch import Tensor

# Of how far the features of unlike images lie apart: a float32 sum taken in another order moves them by less. GPUs may
# round factors to ten bits (TF32), in one kernel and not in another, and choose kernels by the size of the batch.
_ROUNDING_CPU, _ROUNDING_GPU = 1e-3, 1e-2


def unlike_images(shape: tuple[int, ...]) -> Tensor:
    """Four images (4, channels, height, width) in [0, 1] whose statistics have nothing in common.

    Dark noise, bright noise, a ramp over the columns, black and white noise; from a public seed. None is flat, which a
    norm within a record would blow up.

    Args:
        shape: (channels, height, width).
    """
    noise = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0, 1, shape[-1]).expand(shape)
    return torch.stack([0.1 * noise[0], 1 - 0.1 * noise[1], ramp, noise[2].round()])


@torch.no_grad()
def mixes_records(run: Callable[[Tensor], Tensor], images: Tensor) -> bool:
    """Tell whether what a map gives for an image changes with the images beside it, by more than rounding.

    Images of one kind (noise, say) would not show it: their batch statistics are nearly those of each alone. It is a
    look at one batch, not a proof.

    Args:
        run: (n, ...) -> (n, ...).
        images: unlike ones, two or more; each is given alone and with all others.
    """
    together = run(images).double().reshape(len(images), -1)
    alone = torch.cat([run(image[None]) for image in images]).double().reshape(len(images), -1)
    if together.shape != alone.shape or not torch.equal(together.isfinite(), alone.isfinite()):
        return True
    together, alone = together.nan_to_num(0, 0, 0), alone.nan_to_num(0, 0, 0)
    rounding = _ROUNDING_CPU if images.device.type == "cpu" else _ROUNDING_GPU
    apart = (alone - alone.mean(0)).norm(dim=1).max()
    # features that hardly differ between images are rounded by their own size
    return bool((together - alone).norm(dim=1).max() > rounding * apart + 1e-2 * rounding * alone.norm(dim=1).max())
