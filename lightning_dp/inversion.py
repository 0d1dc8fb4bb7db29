"""Model inversion: images whose features add up to a released mixture, and how near they come to the records in it.

The attack is the regularised maximum likelihood of He, Zhang and Lee 2019 as used in appendix K of Li, Cao and Yao 2024
(arXiv 2202.06467): all images of a mixture are fitted at once, smooth ones preferred. It knows the encoder, the divisor
and how many records there are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm


@dataclass(frozen=True)
class Inversion:
    """Settings of the attack; those of the paper, but for the number of steps (5,000 there).

    Args:
        steps: of Adam.
        lr: its learning rate, in units of intensity in [0, 1].
        smoothness: weight of the mean total variation of the images.
        images_at_once: images that are fitted together, at most; performance only.
    """

    steps: int = 500
    lr: float = 0.1
    smoothness: float = 1e-4
    images_at_once: int = 256

    def __call__(
        self, observed: Tensor, degree: int, features: Callable[[Tensor], Tensor], shape: tuple[int, ...], seed: int
    ) -> Tensor:
        """Images (mixtures, degree, channels, height, width) in [0, 1] that explain ``observed``.

        Args:
            observed: released means of ``degree`` feature vectors, (mixtures, values).
            degree: records of each mixture.
            features: images (n, *shape) in [0, 1] -> vectors (n, values); passes gradients back.
            shape: channels, height, width.
            seed: of the start, uniform noise.
        """
        generator = torch.Generator().manual_seed(seed)
        parts = torch.split(observed, max(1, self.images_at_once // degree))
        found = []
        with tqdm(total=len(parts) * self.steps, desc="inversion") as progress, torch.enable_grad():
            for part in parts:
                start = torch.rand(len(part) * degree, *shape, generator=generator)
                images = start.to(observed.device).requires_grad_()
                optimizer = torch.optim.Adam([images], lr=self.lr)
                for _ in range(self.steps):
                    means = features(images).view(len(part), degree, -1).mean(1)
                    misfit = (means - part).square().sum()
                    loss = misfit + self.smoothness * total_variation(images).sum() / degree
                    (images.grad,) = torch.autograd.grad(loss, [images])
                    optimizer.step()
                    with torch.no_grad():
                        images.clamp_(0, 1)
                    progress.update()
                found.append(images.detach().view(len(part), degree, *shape))
        return torch.cat(found)


def total_variation(images: Tensor) -> Tensor:
    """Sum of the absolute differences of neighbouring pixels of each image (n, channels, height, width): (n,).

    Example:
        >>> total_variation(torch.eye(2).view(1, 1, 2, 2)).tolist()
        [4.0]
    """
    down, right = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    return down.flatten(1).sum(1) + right.flatten(1).sum(1)


def matched(guesses: Tensor, records: Tensor) -> Tensor:
    """``guesses`` (k, ...) of one mixture in the order of the ``records`` (k, ...) that they are most like, in all.

    Example:
        >>> flat, up = torch.tensor([[0.5, 0.5, 0.6]]), torch.tensor([[0.0, 1.0, 0.0]])
        >>> torch.equal(matched(torch.cat([up, flat]), torch.cat([flat, up])), torch.cat([flat, up]))
        True
    """
    likeness = _outlines(records) @ _outlines(guesses).T
    rows, columns = linear_sum_assignment(likeness.square().cpu().numpy(), maximize=True)
    assert rows.tolist() == list(range(len(records)))
    return guesses[torch.from_numpy(columns)]


def aligned(guesses: Tensor, records: Tensor) -> Tensor:
    """Images (n, ...) brought to the brightness and contrast that fit ``records`` best; a contrast may be negative.

    Normalised features of moduli do not tell an image from its negative, a brighter or a paler one.

    Example:
        >>> record = torch.tensor([[0.0, 0.5, 1.0]])
        >>> torch.allclose(aligned(0.7 - 0.2 * record, record), record, atol=1e-6)
        True
    """
    flat, wanted = guesses.flatten(1), records.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    slope = (centred * wanted).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True).clamp(min=1e-12)
    return (wanted.mean(1, keepdim=True) + slope * centred).clamp(0, 1).view_as(guesses)


def psnr(guesses: Tensor, records: Tensor) -> Tensor:
    """Peak signal to noise ratio of images in [0, 1], in dB, (n,)."""
    return -10 * (guesses - records).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def ssim(guesses: Tensor, records: Tensor) -> Tensor:
    """Structural similarity of images in [0, 1], (n,)."""
    found = structural_similarity_index_measure(guesses, records, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)
    return found


def likeness(guesses: Tensor, candidates: Tensor) -> Tensor:
    """How well the best guess of a mixture fits each candidate, whatever its brightness and contrast.

    Args:
        guesses: (mixtures, degree, ...).
        candidates: (mixtures, n, ...).

    Returns:
        Squared correlation of the pixels, (mixtures, n).
    """
    shapes = (part.flatten(0, 1) for part in (candidates, guesses))
    ours, theirs = (_outlines(part) for part in shapes)
    ours, theirs = ours.view(*candidates.shape[:2], -1), theirs.view(*guesses.shape[:2], -1)
    return (ours @ theirs.transpose(1, 2)).square().amax(2)


def _outlines(images: Tensor) -> Tensor:
    """Images (n, ...) as vectors (n, pixels) of mean 0 and length 1; a plain one as 0."""
    flat = images.flatten(1)
    return torch.nn.functional.normalize(flat - flat.mean(1, keepdim=True))
