import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_dp.data import CIFAR10, MNIST, Digits, DPDataModule, Records, Shift, content_hashes
from lightning_dp.errors import ConfigError
from lightning_dp.privacy.mechanism import PrivacyConfig
from tests.data.made import Made, records, write_folder

PRIVACY = PrivacyConfig(num_examples=1240, expected_batch_size=62, steps=40, delta=1e-4, noise_multiplier=1.0, seed=5)


def digits(**settings: Any) -> DPDataModule:
    data = DPDataModule(Digits(), **{"audit": 100, "public_per_class": 10, "validation": "public", **settings})
    data.prepare_data()
    data.setup()
    return data


class Recorder(pl.LightningModule):
    """Keeps what every hook is given."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = nn.Linear(1, 1)
        self.seen = {"fit": [], "validate": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["fit"].append(batch)
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        self.seen["validate"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(folder, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, use_distributed_sampler=False, **quiet, **settings
    )


def test_roles_have_their_sizes_and_share_no_record():
    data = digits()
    assert data.roles() == {
        "private": 1237,
        "public": 100,
        "synthetic": 0,
        "validation": 100,
        "test": 360,
        "audit": 100,
    }
    hashes = [set(content_hashes(data.role(name).images)) for name in ("private", "public", "audit", "test")]
    assert sum(map(len, hashes)) == len(set.union(*hashes)) == 1797
    assert torch.equal(data.role("validation").images, data.role("public").images)
    assert data.role("private").images.dtype == torch.uint8


def test_private_validation_is_carved_out_and_declared():
    data = digits(validation="private", validation_private=50)
    assert (data.roles()["validation"], data.roles()["private"]) == (50, 1187)
    assert data.validation_is_private
    assert data.describe()["validation_is_private"] is True
    assert not digits().validation_is_private


@pytest.mark.parametrize("name", ["synthetic", "privat"])
def test_role_without_records_names_those_that_have_some(name):
    with pytest.raises(ConfigError) as caught:
        digits().role(name)
    assert str(caught.value) == (
        f"the data has no '{name}' records; roles with records: private, public, validation, test, audit"
    )


def test_public_source_must_not_hold_private_records():
    train = records(40)
    clean, leaking = records(10, seed=1), Records(train.images[5:8], train.labels[5:8])
    data = DPDataModule(Made(train, records(10, seed=2)), public=Made(clean, clean), validation="public")
    data.setup()
    assert (data.roles()["private"], data.roles()["public"], data.roles()["validation"]) == (40, 10, 10)
    for role in ("public", "synthetic"):
        data = DPDataModule(Made(train, clean), **{role: Made(leaking, leaking)})
        with pytest.raises(ConfigError, match=f"private and {role} share 3 record"):
            data.setup()


def test_copies_in_test_stay_private_and_are_announced_but_not_published():
    train = records(60)
    test = Records(torch.cat([train.images[:7], records(5, seed=1).images]), torch.zeros(12, dtype=torch.int64))
    data = DPDataModule(Made(train, test), audit=20, public_per_class=10)
    with pytest.warns(UserWarning, match="7 private records are in the test role"):
        data.setup()
    assert set(content_hashes(train.images[:7])) <= set(content_hashes(data.role("private").images))
    assert "private/test" not in data.describe()["overlaps"]


def test_saved_split_is_reused_exactly(tmp_path):
    data = digits(splits=None, split_seed=3)
    data._roles.save(tmp_path / "splits.json")
    again = digits(splits=tmp_path / "splits.json", split_seed=3)
    for name in ("private", "public", "audit"):
        assert torch.equal(again.role(name).images, data.role(name).images)
    with pytest.raises(ConfigError, match="split_seed 3, not 4"):
        digits(splits=tmp_path / "splits.json", split_seed=4)
    other = DPDataModule(
        Made(records(1437), records(9, seed=1)), splits=tmp_path / "splits.json", audit=100, split_seed=3
    )
    other.split_settings = data.split_settings
    with pytest.raises(ConfigError, match="other records"):
        other.setup()


def test_description_is_json_without_exact_private_figures():
    text = json.dumps(digits(privacy=PRIVACY).describe())
    assert json.loads(text)["sizes"]["private"] == 1240
    assert "1237" not in text
    assert json.loads(text)["public"] == "10 per class of Digits, taken out of private"


def test_digest_of_the_description_does_not_depend_on_private_records():
    def released(change, row):
        train = records(40)
        train.images[row] += change
        data = DPDataModule(Made(train, records(10, seed=2)), audit=10)
        data.setup()
        return data.describe()["split_digest"]

    data = DPDataModule(Made(records(40), records(10, seed=2)), audit=10)
    data.setup()
    private, audit = (data._roles.split.indices[role][0] for role in ("private", "audit"))
    assert released(0, private) == released(1, private)
    assert released(0, audit) != released(1, audit)


def test_declared_size_must_be_near_the_private_role():
    digits(privacy=PrivacyConfig(num_examples=1248, expected_batch_size=62, steps=40, delta=1e-4, epsilon=1.0))
    far = PrivacyConfig(num_examples=1260, expected_batch_size=62, steps=40, delta=1e-4, epsilon=1.0)
    with pytest.raises(ConfigError) as caught:
        digits(privacy=far)
    assert str(caught.value) == (
        "privacy.num_examples is 1260 but the private role holds about 1240 records: "
        "set it to a rounded public figure near 1240"
    )
    data = DPDataModule(Digits(), privacy=far)
    data.setup("test")  # nothing is trained, so nothing can be sampled at a wrong rate


def batches(data):
    return [(images.clone(), labels.clone()) for images, labels in data.train_dataloader()]


def test_workers_do_not_change_the_batches():
    alone, helped = batches(digits(privacy=PRIVACY)), batches(digits(privacy=PRIVACY, num_workers=2))
    assert len(alone) == len(helped) == 20
    for (images, labels), (same_images, same_labels) in zip(alone, helped, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
        assert images.dtype == torch.uint8
    assert len({len(labels) for _, labels in alone}) > 5


def test_batches_come_from_the_private_role_only():
    data = digits(privacy=PRIVACY)
    private = set(content_hashes(data.role("private").images))
    assert set(content_hashes(torch.cat([images for images, _ in batches(data)]))) < private


def test_without_a_seed_every_loader_draws_afresh():
    unseeded = PrivacyConfig(num_examples=1240, expected_batch_size=62, steps=40, delta=1e-4, epsilon=1.0)
    data = digits(privacy=unseeded)
    assert [len(labels) for _, labels in batches(data)] != [len(labels) for _, labels in batches(data)]


def test_global_generators_are_left_alone():
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    data = digits(privacy=PRIVACY)
    batches(data)
    list(data.test_dataloader()[0])
    assert torch.equal(torch_state, torch.random.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


def test_training_without_a_privacy_section_is_refused():
    with pytest.raises(ConfigError, match="training needs the privacy section"):
        digits().train_dataloader()


def test_under_lightning_training_batches_stay_uint8_and_all_others_are_normalised(tmp_path):
    data, model = digits(privacy=PRIVACY, eval_batch_size=150), Recorder()
    run = trainer(tmp_path, max_steps=25)
    run.fit(model, data)
    run.test(model, data, verbose=False)
    run.predict(model, data)
    assert len(model.seen["fit"]) == 25
    assert all(images.dtype == torch.uint8 for images, _ in model.seen["fit"])
    expected = batches(digits(privacy=PRIVACY))  # 20 steps, one pass of the loader
    assert all(torch.equal(images, seen[0]) for (images, _), seen in zip(expected, model.seen["fit"], strict=False))
    rows = data.role("private").images
    drawn = [data.train_dataloader().batch_sampler.draw(step) for step in range(20, 25)]  # the second pass goes on
    assert all(torch.equal(rows[draw], seen[0]) for draw, seen in zip(drawn, model.seen["fit"][20:], strict=True))
    for stage in ("validate", "test", "predict"):
        assert all(images.dtype == torch.float32 for images, _ in model.seen[stage])
    whole = torch.cat([images for images, _ in model.seen["test"]])
    assert torch.equal(whole, data.normalize(data.role("test").images))
    assert len(torch.cat([labels for _, labels in model.seen["predict"]])) == 360


def test_fit_saves_the_split_with_the_logs_and_test_does_not(tmp_path):
    trainer(tmp_path / "tested").test(Recorder(), DPDataModule(Digits()), verbose=False)
    assert not (tmp_path / "tested" / "splits.json").exists()
    data = DPDataModule(Digits(), audit=100, public_per_class=10, privacy=PRIVACY)
    trainer(tmp_path, max_steps=1).fit(Recorder(), data)  # and without a validation role
    document = json.loads((tmp_path / "splits.json").read_text())
    assert document["sizes"]["private"] == len(document["indices"]["private"]) == 1237


class Encoder(nn.Module):
    """Two features per image; batch norm and dropout show whether it runs in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 2))

    def forward(self, images):
        return self.layers(images)


def test_encoder_is_applied_once_to_every_role_record_by_record(tmp_path):
    raw = digits(validation="private", validation_private=30)
    encoder = Encoder()
    data = digits(validation="private", validation_private=30, encoder=encoder, eval_batch_size=64, cache=tmp_path)
    for name in ("private", "public", "validation", "test", "audit"):
        features = data.role(name).images
        with torch.no_grad():
            expected = encoder.eval()(raw.normalize(raw.role(name).images))
        assert torch.allclose(features, expected, atol=1e-5)
        assert torch.equal(data.role(name).labels, raw.role(name).labels)
    assert data.normalize(features) is features
    assert not features.requires_grad
    assert data.describe()["encoder"] == "Encoder"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": Encoder(), "augment": Shift()}, r"data.augment has no effect .* data.encoder"),
        ({"public": Digits(), "public_per_class": 1}, r"data.public and data.public_per_class exclude"),
        ({"validation": "public"}, r"data.validation public needs public records"),
        ({"validation": "private"}, r"data.validation private does not go with data.validation_private 0"),
        ({"validation_private": 5}, r"data.validation none does not go with data.validation_private 5"),
        ({"eval_batch_size": 0}, r"data.eval_batch_size must be at least 1"),
        ({"audit": -1}, r"data.audit is -1"),
        ({"synthetic": MNIST()}, r"data.synthetic MNIST has 1 x 28 x 28 images but data.source Digits 1 x 8 x 8"),
        ({"public": CIFAR10()}, r"data.public CIFAR10 has 3 x 32 x 32 images"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        DPDataModule(Digits(), **settings)
    assert "\n" not in str(caught.value)


def test_environment_replaces_the_root(tmp_path, monkeypatch):
    assert DPDataModule(Digits()).root == Path("data")
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(tmp_path))
    data = DPDataModule(MNIST(), root=Path("elsewhere"))
    with pytest.raises(ConfigError, match=f"MNIST was not found below {tmp_path}/"):
        data.prepare_data()


def test_decoded_images_are_indexed_not_copied(tmp_path):
    from lightning_dp.data import ImageFolder

    write_folder(tmp_path / "train", 2, 10)
    data = DPDataModule(ImageFolder(Path("train"), 2, image_size=6), root=tmp_path, audit=3)
    data.prepare_data()
    data.setup()
    parts = [data._datasets[name].records.images.data_ptr() for name in ("private", "audit")]
    assert parts[0] == parts[1]
    assert data.test_dataloader() == []
    assert data.roles()["private"] == 17
