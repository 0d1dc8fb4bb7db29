"""The command line: LightningCLI with a privacy section, and a few verbs of its own. No logic of the mechanism here."""

import dataclasses
import difflib
import inspect
import pydoc
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import docstring_parser
import pytorch_lightning
import torch
from jsonargparse import ArgumentError, auto_cli
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from lightning_dp import callbacks, data, methods, models
from lightning_dp.attack import attack
from lightning_dp.callbacks import CanaryAudit
from lightning_dp.compare import compare
from lightning_dp.data import DPDataModule, ReleaseDataModule
from lightning_dp.downstream import downstream
from lightning_dp.errors import ConfigError
from lightning_dp.generate import generate
from lightning_dp.invert import invert
from lightning_dp.methods import Classifier
from lightning_dp.plan import plan
from lightning_dp.privacy import PrivacyConfig
from lightning_dp.spent import ledger

# Imported, so configurations can use the bare names of their classes.
_NAMED = (methods, data, models, callbacks, pytorch_lightning.callbacks, torch.optim, torch.optim.lr_scheduler)

_VERBS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "attack": attack,
    "invert": invert,
    "ledger": ledger,
    "generate": generate,
    "compare": compare,
    "downstream": downstream,
}
"""Verbs besides those of LightningCLI, by name."""


class DPCLI(LightningCLI):
    """``fit | validate | test | predict`` with one ``privacy`` section for model, data and the number of steps.

    After a fit the final weights are tested once, so that one command ends with a number and a complete card.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the privacy section and link it, so that what is accounted is what is sampled and what is clipped."""
        _add_privacy(parser)
        parser.link_arguments("privacy", "model.init_args.privacy", compute_fn=_given_privacy)
        parser.link_arguments("privacy", "data.init_args.privacy", compute_fn=_given_privacy)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, limited to the accounted steps; what Lightning cannot build is reported in one line.

        No link of the parser: without a privacy section ``trainer.max_steps`` is free to be given.
        """
        steps, limit = (self._get(self.config, key) for key in ("privacy.steps", "trainer.max_steps"))
        if steps is not None:
            if limit not in (-1, steps):
                raise ConfigError(f'trainer.max_steps {limit} must be given via "privacy.steps", which is {steps}')
            kwargs["max_steps"] = steps
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, ImportError, RuntimeError) as error:
            raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error

    def before_fit(self) -> None:
        """Keep private roles away from models that know nothing of them, and promise nothing in their name."""
        if isinstance(self.datamodule, DPDataModule) and not isinstance(self.model, Classifier):
            raise ConfigError(
                f"{type(self.model).__name__} learns without privacy, but DPDataModule serves private records: set "
                "data to PublicDataModule, with public data only, or choose another model"
            )
        if not isinstance(self.model, Classifier) and (given := _set(self.config[self.subcommand]["privacy"])):
            raise ConfigError(
                f"{type(self.model).__name__} trains without privacy: take the privacy section out "
                f"(privacy.{', privacy.'.join(given)}), or choose another model"
            )

    def after_fit(self) -> None:
        """Test the final weights."""
        trial = self.trainer.fast_dev_run  # type: ignore[attr-defined]  # set by Lightning, not declared
        on_release = isinstance(self.datamodule, ReleaseDataModule) and self.datamodule.source is not None
        if (isinstance(self.model, Classifier) or on_release) and not trial:
            self.trainer.test(self.model, datamodule=self.datamodule)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``lightning-dp`` and ``python -m lightning_dp``."""
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        if arguments and arguments[0] == "audit":
            _audit(arguments[1:])
        elif arguments and arguments[0] in _VERBS:
            verb = arguments[0]
            prog = f"lightning-dp {verb}"
            given = ["--config" if word == "-c" else word for word in arguments[1:]]
            auto_cli(_VERBS[verb], args=given, prog=prog, as_positional=False, exit_on_error=False)
        else:
            _lightning(None if args is None else arguments)
    except Exception as error:
        # jsonargparse wraps what a constructor raises in long reports of every type it tried.
        if (reason := _config_error(error)) is not None:
            sys.exit(f"error: {reason}")
        if isinstance(error, ArgumentError | MisconfigurationException):
            sys.exit(f"error: {explain(str(error))}")
        raise


def explain(message: str) -> str:
    """A parser's report in one line; for an unknown class or argument, the setting and the nearest known names.

    Example:
        >>> explain('Parser key "model": Expected a dot import path string: DPSDG')  # doctest: +ELLIPSIS
        '--model: there is no class DPSDG; nearest: DPSGD, ...'
        >>> explain("Problem with given class_path 'lightning_dp.data.DPDataModule': Option 'audits' is not accepted")
        'DPDataModule takes no audits; nearest: audit, splits, augment'
    """
    refused = re.findall(r"class_path '([\w.]+)':\s*Option '(\w+)' is not accepted", message)
    if refused:
        owner, option = refused[-1]
        near = difflib.get_close_matches(option, inspect.signature(pydoc.locate(owner)).parameters, cutoff=0.4)  # type: ignore[arg-type]
        return f"{owner.rsplit('.', 1)[-1]} takes no {option}; nearest: {', '.join(near) or 'none'}"
    unknown = re.findall(r"(?:Expected a dot import path string:|Expected a path but) ([\w.]+)", message)
    if not unknown:
        return " ".join(message.split())
    setting = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    known = {name for module in _NAMED for name, value in vars(module).items() if isinstance(value, type)}
    near = difflib.get_close_matches(unknown[-1].rsplit(".", 1)[-1], sorted(known), n=3, cutoff=0.4)
    return f"--{setting}: there is no class {unknown[-1]}; nearest: {', '.join(near) or 'none'}"


_DEFAULTS = {
    field.name: None if field.default is dataclasses.MISSING else field.default
    for field in dataclasses.fields(PrivacyConfig)
}
_REQUIRED = [field.name for field in dataclasses.fields(PrivacyConfig) if field.default is dataclasses.MISSING]


def _add_privacy(parser: LightningArgumentParser) -> None:
    """The settings of `PrivacyConfig`; those it requires may be left out together, for a run on public data alone."""
    documented = docstring_parser.parse(PrivacyConfig.__doc__ or "").params
    described = {entry.arg_name: entry.description for entry in documented}
    types = get_type_hints(PrivacyConfig)
    parser.add_class_arguments(PrivacyConfig, "privacy", skip={*_REQUIRED}, instantiate=False)
    for name in _REQUIRED:
        parser.add_argument(f"--privacy.{name}", type=types[name] | None, default=None, help=described[name])


def _given_privacy(section: Any) -> Any:
    """The privacy section, None if nothing in it is given."""
    missing = [name for name in _REQUIRED if section[name] is None]
    if missing and _set(section):
        raise ConfigError(
            f"the privacy section is incomplete: set privacy.{', privacy.'.join(missing)}, or, for a model that "
            "trains without privacy, take the section out"
        )
    return None if missing else section


def _set(section: Any) -> list[str]:
    """Names of the settings of a privacy section that differ from its defaults."""
    return [name for name, default in _DEFAULTS.items() if section[name] != default]


def _config_error(error: BaseException | None) -> ConfigError | None:
    """The first of our own errors in a chain of causes."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def _audit(arguments: list[str]) -> None:
    """A ``fit`` with canaries, whose exit status is 1 if its claim was refuted."""
    trainer: Trainer = _lightning(["fit", *arguments]).trainer
    found = [callback.result for callback in trainer.callbacks if isinstance(callback, CanaryAudit)]  # type: ignore[attr-defined]
    if not found or found[0] is None:
        raise ConfigError("nothing was audited: add -c configs/audit/mislabelled.yaml, or another file of that folder")
    if found[0]["verdict"] == "FAIL":
        sys.exit(1)


def _lightning(arguments: list[str] | None) -> DPCLI:
    # Misleading here: the weights after a step are the ones to keep, and batches are addressed by step, so they resume
    # in mid-epoch; no validation role is a choice. The last is about code of Lightning's own.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    settings: dict[str, Any] = {
        "description": "Train image classifiers under differential privacy. More verbs: `lightning-dp plan` prints "
        "noise, epsilon and steps before anything is trained; `generate` fills a synthetic pool; `compare` runs a set "
        "of configurations; `downstream` trains other networks on a release; `attack` asks who was a member; `invert` "
        "what images come back from a release of features; `ledger` adds up all runs on the same records; `audit` is "
        "a fit with canaries that fails if its claim is refuted.",
        "exit_on_error": False,
    }
    per_verb = {verb: {"exit_on_error": False} for verb in DPCLI.subcommands()}
    return DPCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        # The sampler of DPDataModule serves every rank its share.
        trainer_defaults={"use_distributed_sampler": False},
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": False},
        parser_kwargs={**settings, **per_verb},
        args=arguments,
    )


if __name__ == "__main__":
    main()
