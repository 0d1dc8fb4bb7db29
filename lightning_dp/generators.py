"""Where synthetic images come from. A generator sees class names and seeds, and nothing else: no record of any role."""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from lightning_dp.errors import ConfigError
from lightning_dp.methods.diffusion import ClassDiffusion

_PROMPTED = {"prompt", "height", "width", "num_inference_steps", "guidance_scale", "generator", "output_type"}
_ATTEMPTS = 10  # draws of an image before the safety checker's verdict is taken as final


@dataclass(frozen=True)
class Ask:
    """One image to be made.

    Args:
        label: its class.
        name: of its class.
        index: its number within its class.
        seed: of the pool.
    """

    label: int
    name: str
    index: int
    seed: int

    def stream(self, attempt: int = 0) -> int:
        """Seed of this image alone, 63 bits; the same whatever else is made, and in whatever order."""
        text = f"{self.seed} {self.label} {self.index} {attempt}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Generator(ABC):
    """Makes images of named classes, each a function of its own seed (batches change it by rounding at most)."""

    @abstractmethod
    def describe(self, classes: Sequence[str]) -> dict[str, Any]:
        """All that decides the images, in plain JSON types; goes into the manifest."""

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Read the weights; called before the first `sample`."""

    @abstractmethod
    def sample(self, asks: Sequence[Ask]) -> Tensor:
        """Make images, uint8 (n, channels, height, width)."""


@final
class TextToImage(Generator):
    """A text-to-image pipeline of diffusers: Stable Diffusion and its relatives.

    The prompt of DP-Mix (Bao et al. 2023) is "A photo of a <class name>".

    Args:
        model: name on huggingface.co, or a local folder in diffusers' layout.
        revision: branch, tag or commit of ``model`` on huggingface.co.
        prompt: template; ``{class}`` stands for the class name, which must not be chosen by looking at private records.
        steps: denoising steps.
        guidance: weight of the prompt, as the pipeline's ``guidance_scale``.
        size: height and width in pixels.
        safety: keep the pipeline's own safety checker and draw what it flags again; False takes it out.
        dtype: precision of the weights.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        prompt: str = "A photo of a {class}",
        steps: int = 50,
        guidance: float = 7.5,
        size: int = 512,
        safety: bool = True,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    ) -> None:
        if "{class}" not in prompt:
            raise ConfigError(f"generator.prompt {prompt!r} does not name the class: put {{class}} into it")
        if steps < 1 or size < 8:
            raise ConfigError("generator.steps must be at least 1 and generator.size at least 8 pixels: correct them")
        self.model = model
        self.revision = revision
        self.prompt = prompt
        self.steps = steps
        self.guidance = guidance
        self.size = size
        self.safety = safety
        self.dtype = dtype
        self._pipeline: Any = None

    def describe(self, classes: Sequence[str]) -> dict[str, Any]:
        """Model, prompts and settings; of a local model also a digest of its weights, whose path says little."""
        settings = {
            name: vars(self)[name] for name in ("model", "revision", "steps", "guidance", "size", "safety", "dtype")
        }
        weights = {"weights": weights_digest(Path(self.model))} if Path(self.model).is_dir() else {}
        return {"class": "TextToImage", **settings, **weights, "prompts": [self._prompt(name) for name in classes]}

    def load(self, device: torch.device) -> None:
        """Read the pipeline, from the cache of huggingface_hub if it is there.

        Raises:
            ConfigError: it cannot be read, or does not take a prompt.
        """
        try:
            from diffusers import DiffusionPipeline

            pipeline = DiffusionPipeline.from_pretrained(
                self.model, revision=self.revision, torch_dtype=getattr(torch, self.dtype)
            )
        except ImportError as error:
            raise ConfigError(
                "TextToImage needs the extra `text2image`: pip install 'lightning_dp[text2image]'"
            ) from error
        except (OSError, ValueError, AttributeError) as error:
            reason = next(iter(str(error).splitlines()), repr(error))
            raise ConfigError(
                f"generator.model {self.model} could not be read ({reason}): name a pipeline of huggingface.co or a "
                "folder in diffusers' layout"
            ) from error
        if not set(inspect.signature(pipeline.__call__).parameters) >= _PROMPTED:
            raise ConfigError(f"generator.model {self.model} takes no prompt: choose a text-to-image pipeline")
        if not self.safety and "safety_checker" in pipeline.components:
            pipeline.register_modules(safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline.to(device)

    def sample(self, asks: Sequence[Ask]) -> Tensor:
        """Make images (n, 3, size, size); what the safety checker flags is drawn again from the image's next seed.

        Raises:
            ConfigError: an image was flagged at every attempt.
        """
        images = torch.empty(len(asks), 3, self.size, self.size, dtype=torch.uint8)
        left = list(range(len(asks)))
        for attempt in range(_ATTEMPTS):
            drawn, flagged = self._draw([asks[place] for place in left], attempt)
            images[left] = drawn
            left = [place for place, bad in zip(left, flagged, strict=True) if bad]
            if not left:
                return images
        raise ConfigError(
            f"the safety checker of {self.model} flagged class {asks[left[0]].name!r} {_ATTEMPTS} times in a row: "
            "change generator.prompt, or set generator.safety false"
        )

    def _draw(self, asks: Sequence[Ask], attempt: int) -> tuple[Tensor, list[bool]]:
        result = self._pipeline(
            prompt=[self._prompt(ask.name) for ask in asks],
            height=self.size,
            width=self.size,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            generator=[torch.Generator().manual_seed(ask.stream(attempt)) for ask in asks],
            output_type="np",
        )
        images = torch.from_numpy(np.asarray(result.images)).permute(0, 3, 1, 2)
        flagged = result.get("nsfw_content_detected") or [False] * len(asks)
        return (images * 255).round().clamp(0, 255).to(torch.uint8), [bool(bad) for bad in flagged]

    def _prompt(self, name: str) -> str:
        return self.prompt.replace("{class}", name)


@final
class TrainedDiffusion(Generator):
    """A `ClassDiffusion` checkpoint, sampled by DDIM.

    Args:
        checkpoint: written by ``lightning-dp fit`` on `PublicDataModule`.
        steps: denoising steps.
        guidance: 1 follows the class as learned; more exaggerates what tells it from the others, and soon overexposes.

    Raises:
        ConfigError: ``steps`` below 1.
    """

    def __init__(self, checkpoint: Path, steps: int = 50, guidance: float = 1.0) -> None:
        if steps < 1:
            raise ConfigError(f"generator.steps {steps} must be at least 1")
        self.checkpoint = checkpoint
        self.steps = steps
        self.guidance = guidance
        self._model: ClassDiffusion | None = None

    def describe(self, classes: Sequence[str]) -> dict[str, Any]:
        """Digest of the checkpoint, what it was trained on, and settings.

        Raises:
            ConfigError: no such checkpoint, not trained on `PublicDataModule`, or fewer classes than asked for.
        """
        stored = self._read()
        known = stored["hyper_parameters"]["num_classes"]
        if len(classes) > known:
            raise ConfigError(f"--classes names {len(classes)}, but {self.checkpoint} knows {known}: shorten the list")
        if self.steps > (levels := stored["hyper_parameters"].get("noise_levels", 1000)):
            raise ConfigError(f"generator.steps {self.steps} exceeds the model's {levels} noise levels: lower it")
        digest = hashlib.blake2b(self.checkpoint.read_bytes(), digest_size=16).hexdigest()
        return {
            "class": "TrainedDiffusion",
            "checkpoint": digest,
            "trained_on": stored["PublicDataModule"],
            "steps": self.steps,
            "guidance": self.guidance,
        }

    def load(self, device: torch.device) -> None:
        """Read the weights: the averaged ones, if EMAWeightAveraging was on."""
        model = ClassDiffusion.load_from_checkpoint(self.checkpoint, map_location="cpu", weights_only=True)
        self._model = model.to(device).eval()

    def sample(self, asks: Sequence[Ask]) -> Tensor:
        """Make images (n, channels, image_size, image_size)."""
        assert self._model is not None, "load() comes first"
        shape = (self._model.channels, self._model.image_size, self._model.image_size)
        noise = np.stack([np.random.default_rng(ask.stream()).standard_normal(shape, dtype=np.float32) for ask in asks])
        labels = torch.tensor([ask.label for ask in asks], device=self._model.device)
        return self._model.sample(labels, torch.from_numpy(noise).to(labels.device), self.steps, self.guidance).cpu()

    def _read(self) -> dict[str, Any]:
        """The checkpoint as plain values and tensors."""
        try:
            stored: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # PyTorch and pickle raise half a dozen types here
            raise ConfigError(
                f"generator.checkpoint {self.checkpoint} cannot be read ({type(error).__name__}): train one with "
                "`lightning-dp fit -c configs/base.yaml -c configs/experiments/usps_diffusion.yaml`"
            ) from error
        if "PublicDataModule" not in stored:
            raise ConfigError(
                f"generator.checkpoint {self.checkpoint} was not trained on PublicDataModule, so its images might "
                "reveal private records: use a ClassDiffusion checkpoint"
            )
        return stored


def weights_digest(folder: Path) -> str:
    """BLAKE2b digest of names, sizes and contents of the weight files (safetensors, bin) below a folder."""
    total = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin")):
        with path.open("rb") as file:
            contents = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
        total.update(f"{path.relative_to(folder)} {path.stat().st_size} {contents}\n".encode())
    return total.hexdigest()
