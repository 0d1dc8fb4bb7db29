from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from lightning_dp import data
from lightning_dp.data import DecodedSource, DPDataModule, FlatFolder, Source

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))
TRAINING_RECORDS = {
    "Digits": 1437,
    "MNIST": 60000,
    "FashionMNIST": 60000,
    "KMNIST": 60000,
    "EMNIST-balanced": 112800,
    "CIFAR10": 50000,
    "CIFAR100": 50000,
    "SVHN": 73257,
    "EuroSAT": 21600,
    "Flowers102": 2040,
    "OxfordIIITPet": 3680,
    "Caltech256": 24486,
    "SUN397": 87004,
    "USPS": 7291,
}


def instantiate(path):
    parser = ArgumentParser()
    parser.add_subclass_arguments(DPDataModule, "data")
    parser.add_argument("--privacy.num_examples", type=int)
    parser.add_argument("--model", type=dict)
    return parser.instantiate_classes(parser.parse_path(str(path)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_its_classes_and_declares_the_private_size(path):
    config = instantiate(path)
    module = config.data
    assert isinstance(module, DPDataModule)
    # a few public shots are there to be trained on, and a release is made without looking
    assert module.validation == ("none" if path.stem.endswith(("_few", "_release")) else "public")
    if module.source.name in TRAINING_RECORDS:
        settings = module.split_settings
        private = TRAINING_RECORDS[module.source.name] - settings.audit
        private -= settings.public_per_class * module.num_classes
        assert abs(private - config.privacy.num_examples) <= 0.01 * config.privacy.num_examples


def test_every_source_has_a_config():
    named = {yaml.safe_load(path.read_text())["data"]["init_args"]["source"]["class_path"] for path in CONFIGS}
    exported = {name for name, value in vars(data).items() if isinstance(value, type) and issubclass(value, Source)}
    # a pool is no source of private records
    assert named == exported - {Source.__name__, DecodedSource.__name__, FlatFolder.__name__}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_says_what_it_is(path):
    assert path.read_text().startswith("# ")
