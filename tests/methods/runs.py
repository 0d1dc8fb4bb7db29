"""Small private runs on the digits, shared by the tests of the methods."""

from functools import partial

import torch
from pytorch_lightning import Trainer

from lightning_dp.data import Digits, DPDataModule
from lightning_dp.methods import DPSGD
from lightning_dp.models import LinearHead
from lightning_dp.privacy import PrivacyConfig

STEPS = 12
PRIVACY = PrivacyConfig(
    num_examples=1240, expected_batch_size=60, steps=STEPS, delta=1e-5, noise_multiplier=1.0, max_norm=1.0, seed=7
)


def make_data(privacy=PRIVACY, **settings):
    return DPDataModule(Digits(), privacy=privacy, **{"audit": 100, "public_per_class": 10, **settings})


def make_module(privacy=PRIVACY, net=None, method=DPSGD, physical_batch_size=512, **settings):
    settings = {"optimizer": partial(torch.optim.SGD, lr=1.0, momentum=0.9), **settings}
    net = LinearHead(1, 8, 10) if net is None else net
    return method(net, physical_batch_size=physical_batch_size, privacy=privacy, **settings)


def make_trainer(folder, **settings):
    plain = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": STEPS,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return Trainer(**{**plain, **settings})


def fit(folder, module=None, data=None, ckpt_path=None, **settings):
    """Fit and return the module."""
    module = make_module() if module is None else module
    data = make_data(module.privacy) if data is None else data
    make_trainer(folder, **settings).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def weights(module):
    return torch.cat([value.detach().reshape(-1) for value in module.net.parameters()])
