"""Shows the budget while it is spent. An observer: the module itself stops, with or without it."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lightning_dp.errors import ConfigError
from lightning_dp.methods import DPModule


class PrivacyBudget(Callback):
    """Logs epsilon and what is left of the budget, and shows them with sigma in the progress bar.

    Logged: ``privacy/epsilon`` (certified, of everything in the ledger), ``privacy/delta``,
    ``privacy/noise_multiplier`` and ``privacy/steps_left``. The accountant and the adjacency stand in the message at
    the start and at the end of the fit.

    Args:
        log_every_n_steps: steps between two values; an accounting takes 0.1 to 1 s. None logs twenty values a run.

    Raises:
        ConfigError: ``log_every_n_steps`` below 1.
    """

    def __init__(self, log_every_n_steps: int | None = None) -> None:
        if log_every_n_steps is not None and log_every_n_steps < 1:
            raise ConfigError(f"PrivacyBudget.log_every_n_steps {log_every_n_steps} must be at least 1")
        self.log_every_n_steps = log_every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the run may spend."""
        if isinstance(pl_module, DPModule):
            config, mechanism = pl_module.mechanism.config, pl_module.mechanism
            rank_zero_info(
                f"private training: noise_multiplier {mechanism.noise_multiplier:.4g}, sample_rate "
                f"{config.sample_rate:.4g}, max_norm {config.max_norm:g}, {mechanism.releases_left} releases left; "
                f"spent so far: {mechanism.summary()}"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the state of the ledger."""
        if not isinstance(pl_module, DPModule):
            return
        left = pl_module.mechanism.releases_left
        every = self.log_every_n_steps or max(1, pl_module.mechanism.config.steps // 20)
        if trainer.global_step % every == 0 or left == 0:
            values = {
                "privacy/epsilon": pl_module.mechanism.epsilon(),
                "privacy/steps_left": float(left),
                "privacy/delta": pl_module.mechanism.config.delta,
                "privacy/noise_multiplier": pl_module.mechanism.noise_multiplier,
            }
            # Straight to the loggers: Lightning would repeat a value at every step until the next one is due.
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
            for name, value in self._shown(pl_module, values).items():
                pl_module.log(name, value, prog_bar=True, logger=False, batch_size=1)

    @staticmethod
    def _shown(module: DPModule, values: dict[str, float]) -> dict[str, float]:
        """What the progress bar shows; epsilon never without what it means."""
        config = module.mechanism.config
        epsilon = f"epsilon({config.delta:g}, {config.adjacency}, {config.accountant})"
        left, sigma = values["privacy/steps_left"], values["privacy/noise_multiplier"]
        return {epsilon: values["privacy/epsilon"], "sigma": sigma, "steps_left": left}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the run has spent."""
        if isinstance(pl_module, DPModule):
            rank_zero_info(f"private training ended: {pl_module.mechanism.summary()}")
