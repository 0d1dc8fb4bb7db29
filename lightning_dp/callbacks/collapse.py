"""How suited the features are to mixing, seen on public records."""

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lightning_dp.methods import NeuroMix
from lightning_dp.methods.neuromix import neural_collapse
from lightning_dp.models import LinearHead


class NeuralCollapse(Callback):
    """Logs ``public/nc1`` and ``public/class_distance`` of the features at the start of a `NeuroMix` fit.

    NC1 is the scatter within classes over that between them: the smaller, the less mixing hides. The distance is the
    smallest between two class means. Both are of the public role alone; without one nothing is logged.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        if not isinstance(pl_module, NeuroMix) or not trainer.is_global_zero:
            return
        data = pl_module.datamodule
        if not data.roles()["public"]:
            rank_zero_info("no measures of neural collapse: there are no public records (data.public_per_class)")
            return
        assert isinstance(pl_module.net, LinearHead)
        public = data.role("public")
        features = pl_module.net.features(data.normalize(public.images).to(pl_module.device)).detach()
        nc1, distance = neural_collapse(features.cpu(), public.labels)
        values = {"public/nc1": nc1, "public/class_distance": distance}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=0)
        rank_zero_info(f"public records: NC1 {nc1:.3g}, smallest distance of two class means {distance:.3g}")
