"""Frozen features: an encoder applied to every record by itself, before any training."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_dp.data.transforms import Normalize
from lightning_dp.errors import ConfigError
from lightning_dp.models.probe import mixes_records, unlike_images

_SHOW_PROGRESS_FROM = 5_000


@torch.no_grad()
def encode(
    images: Tensor, encoder: nn.Module, normalize: Normalize, batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield the features of images, batch by batch and in order.

    The encoder runs in evaluation mode, so a record's feature is a function of that record alone (a batch statistic
    would let one private record touch the features of the others).

    Args:
        images: uint8 (n, channels, height, width), possibly memory-mapped.
        encoder: (n, channels, height, width) float32 -> (n, ...).
        normalize: applied before the encoder.
        batch_size: records per call of the encoder; performance only.
        device: where it is run; the features come back to the CPU.

    Yields:
        float32 features of at most ``batch_size`` records, (m, ...).
    """
    encoder.to(device).eval()
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, desc="encoding", leave=False, disable=len(images) <= _SHOW_PROGRESS_FROM):
        batch: Tensor = encoder(normalize(images[start : start + batch_size].to(device)))
        yield batch.float().cpu()


@torch.no_grad()
def feature_shape(
    encoder: nn.Module, image_shape: torch.Size, normalize: Normalize, device: torch.device
) -> tuple[int, ...]:
    """Shape of one record's features, found on made, unlike images: together they must give what each gives alone.

    Args:
        encoder: as in `encode`.
        image_shape: (channels, height, width).
        normalize: applied before the encoder.
        device: where it is run.

    Raises:
        ConfigError: a record's feature depends on the other records of the batch.
    """
    encoder.to(device).eval()
    images = normalize((255 * unlike_images(image_shape)).to(torch.uint8).to(device))
    if mixes_records(encoder, images):
        raise ConfigError(
            f"data.encoder {type(encoder).__name__} makes a record's features depend on its batch (batch statistics?), "
            "so one private record would reach the features of others: use an encoder with fixed statistics"
        )
    return tuple(encoder(images[:1]).shape[1:])
