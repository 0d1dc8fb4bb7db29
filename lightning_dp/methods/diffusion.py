"""A small class-conditional diffusion model for the synthetic role. NOT private: it learns from public data only.

Denoising diffusion (Ho et al. 2020, arXiv 2006.11239) with the cosine noise schedule (Nichol and Dhariwal 2021, arXiv
2102.09672) and velocity targets (Salimans and Ho 2022, arXiv 2202.00512); sampled by DDIM (Song et al. 2021, arXiv
2010.02502) with classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598). Nothing here is released about
private records, because none is seen: the data must come from `PublicDataModule`.
"""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam

from lightning_dp.data.public import PublicDataModule
from lightning_dp.errors import ConfigError

_GROUPS = 8  # of the network's GroupNorm layers


@final
class ClassDiffusion(LightningModule):
    """UNet that is told the class, the noise level and a noisy image, and predicts what to subtract.

    Args:
        num_classes: classes; labels are 0 to num_classes - 1.
        image_size: height and width in pixels.
        channels: 1 for grey, 3 for colour.
        widths: channels of the UNet's levels, each half the size of the one before; multiples of 8.
        patch: the UNet sees squares of patch x patch pixels as one position: 2 is four times cheaper than 1.
        noise_levels: levels of the diffusion.
        unlabelled: share of training images whose class is hidden, so that guidance has something to compare with.
        lr: learning rate of Adam.
        seed: of noise, noise levels and hidden classes in training; public.

    Raises:
        ConfigError: an argument is out of range, or the extra `diffusion` is missing.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        channels: int = 1,
        widths: Sequence[int] = (32, 64, 64),
        patch: int = 2,
        noise_levels: int = 1000,
        unlabelled: float = 0.1,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not widths or any(width < 1 or width % _GROUPS for width in widths):
            raise ConfigError(f"model.widths {list(widths)} must be multiples of {_GROUPS}: correct them")
        if min(num_classes, image_size, channels, patch, noise_levels) < 1 or not 0 <= unlabelled <= 1:
            raise ConfigError("model: sizes must be at least 1 and unlabelled between 0 and 1: correct them")
        self.num_classes = num_classes
        self.image_size = image_size
        self.channels = channels
        self.patch = patch
        self.unlabelled = unlabelled
        self.lr = lr
        self.seed = seed
        step = patch * 2 ** (len(widths) - 1)
        self.padding = -image_size % step
        unet, ddpm, self._ddim = _diffusers()
        self.net = unet(
            sample_size=(image_size + self.padding) // patch,
            in_channels=channels * patch**2,
            out_channels=channels * patch**2,
            layers_per_block=1,
            block_out_channels=tuple(widths),
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            norm_num_groups=_GROUPS,
            # after the norm: added before it, a group of one channel would lose class and level altogether
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=num_classes + 1,  # the last one: class hidden
        )
        self.schedule = ddpm(noise_levels, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")

    def forward(self, noisy: Tensor, levels: Tensor, labels: Tensor) -> Tensor:
        """Velocity (n, channels, height, width) at noisy images of that shape, noise levels (n,), labels (n,)."""
        padded = F.pad(noisy, (0, self.padding, 0, self.padding))
        output: Tensor = self.net(F.pixel_unshuffle(padded, self.patch), levels, class_labels=labels).sample
        return F.pixel_shuffle(output, self.patch)[..., : self.image_size, : self.image_size]

    def configure_callbacks(self) -> list[Any]:
        """No callbacks; the first hook of a fit, so that data with private records are refused before they are opened.

        Raises:
            ConfigError: the data does not come from `PublicDataModule`, or has another shape.
        """
        if self.trainer.state.fn != "fit":
            return []
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
        if not isinstance(datamodule, PublicDataModule):
            raise ConfigError(
                "ClassDiffusion learns without privacy, so it takes public data only: set data to PublicDataModule"
            )
        source = datamodule.source
        expected = (self.num_classes, self.channels, self.image_size)
        if (source.num_classes, source.channels, source.image_size) != expected:
            raise ConfigError(
                f"model.num_classes, channels and image_size are {expected}, but {source.name} has "
                f"{(source.num_classes, source.channels, source.image_size)}: make them the same"
            )
        return []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error of the velocity at one random noise level per image."""
        images, labels = batch
        coins = np.random.default_rng([self.seed, self.trainer.global_step, self.trainer.global_rank])
        clean = images.float() / 127.5 - 1
        noise = torch.from_numpy(coins.standard_normal(clean.shape, dtype=np.float32)).to(clean)
        levels = torch.from_numpy(coins.integers(len(self.schedule.alphas_cumprod), size=len(labels))).to(labels)
        hidden = torch.from_numpy(coins.random(len(labels)) < self.unlabelled).to(labels.device)
        noisy = self.schedule.add_noise(clean, noise, levels)
        velocity = self.schedule.get_velocity(clean, noise, levels)
        loss = F.mse_loss(self(noisy, levels, labels.masked_fill(hidden, self.num_classes)), velocity)
        self.log("train/loss", loss, prog_bar=True)  # of public records
        return loss

    def configure_optimizers(self) -> Adam:
        """Adam at a constant rate; averaging the weights (EMAWeightAveraging) stands in for a decay."""
        return Adam(self.parameters(), lr=self.lr)

    @torch.no_grad()
    def sample(self, labels: Tensor, noise: Tensor, steps: int, guidance: float) -> Tensor:
        """Turn noise into images of the given classes; deterministic, each image a function of its own noise.

        Args:
            labels: shape (n,).
            noise: standard normal, shape (n, channels, image_size, image_size).
            steps: evaluations of the network, at most ``noise_levels``.
            guidance: 1 follows the class as learned, at half the cost; more exaggerates what tells it from the others.

        Returns:
            uint8 of shape (n, channels, image_size, image_size).
        """
        schedule = self._ddim.from_config(self.schedule.config, timestep_spacing="trailing", clip_sample=True)
        schedule.set_timesteps(steps)
        hidden = torch.full_like(labels, self.num_classes)
        images = noise
        for level in schedule.timesteps:
            levels = level.to(noise.device).expand(len(labels))
            velocity = self(images, levels, labels)
            if guidance != 1:
                unguided = self(images, levels, hidden)
                velocity = unguided + guidance * (velocity - unguided)
            images = schedule.step(velocity, level, images).prev_sample
        return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _diffusers() -> tuple[Any, Any, Any]:
    """The network and the two schedulers; imported here because it takes seconds and few runs need it."""
    try:
        from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
    except ImportError as error:
        raise ConfigError(
            "ClassDiffusion needs the extra `diffusion`: pip install 'lightning_dp[diffusion]'"
        ) from error
    return UNet2DModel, DDPMScheduler, DDIMScheduler
