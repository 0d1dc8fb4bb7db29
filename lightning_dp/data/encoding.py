"""Frozen features: an encoder applied once to every record, before any training."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_dp.data.records import Records
from lightning_dp.data.transforms import Normalize
from lightning_dp.errors import ConfigError

_SHOW_PROGRESS_FROM = 5_000


@torch.no_grad()
def encode(
    records: Records, encoder: nn.Module, normalize: Normalize, batch_size: int, device: torch.device
) -> Records:
    """Replace images by their features.

    The encoder runs in evaluation mode, so a record's feature is a function of that record alone (a batch statistic
    would let one private record touch the features of the others).

    Args:
        records: uint8 images.
        encoder: (n, channels, height, width) normalised float32 -> (n, ...).
        normalize: applied before the encoder.
        batch_size: records per call of the encoder.
        device: where it is run; the encoder stays there, the features come back to the CPU.

    Returns:
        Records with float32 features.

    Raises:
        ConfigError: a record's feature depends on the other records of the batch.
    """
    encoder.to(device).float().eval()
    _check_by_record(encoder, records, normalize, device)
    starts = range(0, max(len(records), 1), batch_size)  # an empty role keeps the features' shape
    features: Tensor | None = None
    for start in tqdm(starts, desc="encoding", leave=False, disable=len(records) <= _SHOW_PROGRESS_FROM):
        images = records.images[start : start + batch_size].to(device)
        batch = encoder(normalize(images)).float().cpu()
        if features is None:
            features = batch.new_empty((len(records), *batch.shape[1:]))
        features[start : start + batch_size] = batch
    assert features is not None
    return Records(features, records.labels)


def _check_by_record(encoder: nn.Module, records: Records, normalize: Normalize, device: torch.device) -> None:
    """Compare a batch of made images with the same images one by one."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, *records.images.shape[1:])
    images = normalize(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device))
    together, alone = encoder(images), torch.cat([encoder(image[None]) for image in images])
    if not torch.allclose(together, alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max())):
        raise ConfigError(
            f"data.encoder {type(encoder).__name__} makes a record's features depend on its batch (batch statistics?), "
            "so one private record would reach the features of others: use an encoder with fixed statistics"
        )
