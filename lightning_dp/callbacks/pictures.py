"""What the method shows the network, as pictures in TensorBoard."""

from dataclasses import replace

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torchvision.utils import make_grid

from lightning_dp.data import DPDataModule, Records, make_views
from lightning_dp.errors import ConfigError
from lightning_dp.methods import Classifier, DPMix, DPModule
from lightning_dp.privacy import Randomness

_PUBLIC_SEED = 0


class Pictures(Callback):
    """Draws grids at the start of a fit: one row per record, one column per view.

    Pictures are released as they are, without noise. So they are made of public records, or else of synthetic ones,
    with coins of a public seed; nothing is drawn if there are neither. Tags: ``pictures/records`` (unchanged),
    ``pictures/views`` (augmented) and, of `DPMix`, ``pictures/synthetic`` and ``pictures/mixtures``.

    Args:
        records: rows of a grid.
        private_records: private records to draw in addition, in grids ``pictures/private_...``. **Outside the
            guarantee**: whoever sees the log sees these people's images. The card says how many were drawn,
            also that of a run resumed from this one.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, records: int = 8, private_records: int = 0) -> None:
        if records < 1 or private_records < 0:
            raise ConfigError("Pictures.records must be at least 1 and Pictures.private_records at least 0")
        self.records = records
        self.private_records = private_records

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, on the first process."""
        assert isinstance(pl_module, Classifier)
        data = pl_module.datamodule
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not trainer.is_global_zero or not boards:
            return
        if data.encoder is not None:
            rank_zero_info("no pictures: data.encoder has replaced all images by features")
            return
        grids = self._grids(pl_module)
        for board in boards:
            for tag, grid in grids.items():
                board.experiment.add_image(f"pictures/{tag}", grid, trainer.global_step)

    def _grids(self, module: Classifier) -> dict[str, Tensor]:
        """Pictures by tag, (channels, height, width) in [0, 1]."""
        data, grids = module.datamodule, {}
        sizes = data.roles()
        free = [name for name in ("public", "synthetic") if sizes[name]]
        if free:
            grids = _draw(module, _first(data, free[0], self.records))
        else:
            rank_zero_info("no pictures: there are neither public nor synthetic records (Pictures.private_records)")
        if self.private_records:
            shown = _first(data, "private", self.private_records)
            grids |= {f"private_{tag}": grid for tag, grid in _draw(module, shown).items()}
            if isinstance(module, DPModule):
                module.disclose(
                    f"pictures of {len(shown)} private records are in the TensorBoard log (Pictures.private_records)"
                )
        return grids


def _first(data: DPDataModule, role: str, count: int) -> Records:
    records = data.role(role)
    return Records(records.images[:count], records.labels[:count])


@torch.no_grad()
def _draw(module: Classifier, records: Records) -> dict[str, Tensor]:
    """Grids of some records and of their views, with coins that are public."""
    data = module.datamodule
    coins = module.record_coins(len(records), Randomness.from_seed(_PUBLIC_SEED).numpy("pictures", 0))
    images, labels = records.images.to(module.device), records.labels.to(module.device)
    named = {"records": data.normalize(images)[:, None]}
    if isinstance(module, DPMix):
        plan = replace(module.plan, include_unmixed_views=True)
        views, _ = make_views(
            images, labels, coins, module.synthetic, plan, data.augment, data.normalize, data.num_classes
        )
        parts = torch.split(views, [plan.k_base, plan.k_diff, plan.k_self], dim=1)
        named |= dict(zip(("views", "synthetic", "mixtures"), parts, strict=True))
    else:
        named["views"] = module.prepare(images, coins, labels)[0][:, None]
    return {tag: _grid(data, columns) for tag, columns in named.items() if columns.shape[1]}


def _grid(data: DPDataModule, views: Tensor) -> Tensor:
    """Normalised views (n, k, channels, height, width) as one picture with n rows and k columns."""
    mean = torch.tensor(data.source.mean, device=views.device).view(-1, 1, 1)
    std = torch.tensor(data.source.std, device=views.device).view(-1, 1, 1)
    pixels = (views.flatten(0, 1) * std + mean).clamp(0, 1)
    grid: Tensor = make_grid(pixels.cpu(), nrow=views.shape[1])
    return grid
