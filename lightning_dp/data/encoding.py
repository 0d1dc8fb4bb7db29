"""Frozen features: an encoder applied once to every record, before any training."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_dp.data.records import Records
from lightning_dp.data.transforms import Normalize

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
    """
    encoder.to(device).float().eval()
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
