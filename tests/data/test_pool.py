import json
from contextlib import nullcontext

import pytest
import torch
from PIL import Image

from lightning_dp.data import EMNIST, MNIST, Digits, DPDataModule, FlatFolder, ImageFolder, PublicDataModule, Records
from lightning_dp.data.pool import check_origin, describe_pool
from lightning_dp.data.records import content_hashes
from lightning_dp.errors import ConfigError
from tests.data.made import Made, records, write_folder, write_image

MANIFEST = {"format": 1, "classes": ["a", "b"], "per_class": 2, "seed": 0, "generator": {"class": "TextToImage"}}


def write_pool(folder, size=(4, 4), per_class=2):
    for index in range(per_class):
        for label in range(2):
            write_image(folder / f"{index:06d}_{label}.png", 100 * label + index, size)
    return folder


def write_manifest(folder, **changed):
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | changed))


@pytest.mark.parametrize("channels", [1, 3])
def test_labels_are_read_from_the_names(tmp_path, channels):
    write_pool(tmp_path / "pool")
    (tmp_path / "pool" / "notes.txt").write_text("no image")
    write_image(tmp_path / "pool" / "preview" / "grid.png", 0)
    source = FlatFolder("pool", num_classes=2, image_size=4, channels=channels)
    loaded = source.load(tmp_path, True, False)
    assert loaded.images.shape == (4, channels, 4, 4)
    assert loaded.labels.tolist() == [0, 1, 0, 1]
    assert len(source.load(tmp_path, False, False)) == 0
    assert len(source.mean) == len(source.std) == channels


def test_grey_pools_keep_their_pixels(tmp_path):
    (tmp_path / "pool").mkdir()
    Image.new("L", (4, 4), 7).save(tmp_path / "pool" / "x_1.png")
    assert FlatFolder("pool", 2, 4, 1).load(tmp_path, True, False).images.unique().tolist() == [7]


@pytest.mark.parametrize("name", ["0.png", "a_b.png", "a_2.png", "a_-1.png"])
def test_a_file_without_a_label_is_named(tmp_path, name):
    write_image(write_pool(tmp_path / "pool") / name, 0)
    with pytest.raises(ConfigError, match=rf"{name} does not end in _<label>"):
        FlatFolder("pool", 2, 4).load(tmp_path, True, False)


def test_missing_empty_and_unfinished_pools_are_refused(tmp_path):
    source = FlatFolder("pool", 2, 4)
    with pytest.raises(ConfigError, match="is no folder"):
        source.load(tmp_path, True, False)
    (tmp_path / "pool").mkdir()
    with pytest.raises(ConfigError, match="has 0 images of at least 1"):
        source.load(tmp_path, True, False)
    write_manifest(write_pool(tmp_path / "pool"))
    assert len(source.load(tmp_path, True, False)) == 4
    (tmp_path / "pool" / "000001_1.png").unlink()
    with pytest.raises(ConfigError, match="has 3 images of 4"):
        source.load(tmp_path, True, False)


def describe(root, source):
    loaded = source.load(root, True, False)
    return describe_pool(source, root, content_hashes(loaded.images), loaded.labels)


def test_the_digests_follow_manifest_pixels_and_labels(tmp_path):
    pool, source = write_pool(tmp_path / "pool"), FlatFolder("pool", 2, 4)
    first = describe(tmp_path, source)
    assert first["manifest"] == "no manifest"
    write_manifest(pool)
    second = describe(tmp_path, source)
    assert len(second["manifest"]) == 32
    assert second["contents"] == first["contents"]
    write_manifest(pool, seed=1)
    assert describe(tmp_path, source)["manifest"] != second["manifest"]
    (pool / "000000_1.png").rename(pool / "000000_1_0.png")  # the same pixels in the same order, another label
    relabelled = describe(tmp_path, source)["contents"]
    assert relabelled != second["contents"]
    write_image(pool / "000000_0.png", 77, (4, 4))
    assert describe(tmp_path, source)["contents"] != relabelled


@pytest.mark.parametrize("role", ["public", "synthetic"])
def test_a_pool_of_a_model_trained_on_the_private_source_is_refused(tmp_path, role):
    write_manifest(write_pool(tmp_path / "pool"), generator={"trained_on": {"source": "Digits", "digest": "0"}})
    source = FlatFolder("pool", 2, 8, 1)
    assert describe(tmp_path, source)["source"] == "FlatFolder"
    data = DPDataModule(Digits(), tmp_path, **{role: source})
    with pytest.raises(ConfigError, match=f"data.{role} .* trained on Digits, the private source"):
        data.setup()


def test_the_same_records_by_another_name_are_the_private_source(tmp_path):
    declared = PublicDataModule(Digits(), tmp_path)
    declared.setup()
    trained_on = declared.state_dict() | {"source": "Other"}
    write_manifest(write_pool(tmp_path / "pool"), generator={"trained_on": trained_on})
    with pytest.raises(ConfigError, match="trained on Other, the private source"):
        DPDataModule(Digits(), tmp_path, synthetic=FlatFolder("pool", 2, 8, 1)).setup()


FAMILIES = [
    ({"source": "EMNIST-byclass"}, EMNIST("letters"), True),
    ({"source": "EMNIST-byclass"}, MNIST(), False),
    ({"source": "ImageFolder"}, ImageFolder("mine", 2), True),  # an old manifest: it might be the same folder
    ({"source": "ImageFolder", "folder": "mine/train"}, ImageFolder("mine", 2), True),
    ({"source": "FlatFolder", "folder": "mine"}, ImageFolder("mine/train", 2), True),
    ({"source": "ImageFolder", "folder": "yours"}, ImageFolder("mine", 2), False),
    ({"source": "USPS"}, ImageFolder("mine", 2), False),
]


@pytest.mark.parametrize(("trained_on", "private", "refused"), FAMILIES)
def test_families_and_folders_are_compared(tmp_path, trained_on, private, refused):
    write_manifest(write_pool(tmp_path / "pool"), generator={"trained_on": trained_on})
    pool = FlatFolder("pool", 2, 4)
    with pytest.raises(ConfigError, match="the private source") if refused else nullcontext():
        check_origin("public", pool, private, tmp_path, "0")


def test_the_manifest_of_a_folder_of_class_folders_is_read(tmp_path):
    write_folder(tmp_path / "pool", 2, 1)
    pool = ImageFolder("pool", 2, image_size=4)
    assert describe(tmp_path, pool)["manifest"] == "no manifest"
    write_manifest(tmp_path / "pool", generator={"trained_on": {"source": "MNIST"}})
    assert len(describe(tmp_path, pool)["manifest"]) == 32
    with pytest.raises(ConfigError, match=r"data\.synthetic pool was generated by a model trained on MNIST"):
        check_origin("synthetic", pool, MNIST(), tmp_path, "0")


def test_folders_are_named_to_those_who_train_on_them(tmp_path):
    write_folder(tmp_path / "pool", 2, 1)
    declared = PublicDataModule(ImageFolder("pool", 2, image_size=4), tmp_path)
    assert declared.state_dict()["folder"] == "pool"


def test_a_broken_manifest_is_named(tmp_path):
    (write_pool(tmp_path / "pool") / "manifest.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"manifest\.json is not a manifest"):
        FlatFolder("pool", 2, 4).load(tmp_path, True, False)


def test_the_card_names_the_pool(tmp_path):
    write_manifest(write_pool(tmp_path / "pool"))
    data = DPDataModule(Made(records(20), records(5, 1)), tmp_path, synthetic=FlatFolder("pool", 2, 4, 1))
    assert data.describe()["synthetic_pool"] is None
    data.setup("test")
    assert data.describe()["synthetic_pool"].keys() == {"source", "manifest", "contents"}
    assert json.dumps(data.describe())


def test_any_source_may_be_synthetic_and_has_no_manifest(tmp_path):
    pool = Made(records(6, 2), Records(torch.empty(0, 1, 4, 4, dtype=torch.uint8), torch.empty(0, dtype=torch.long)))
    data = DPDataModule(Made(records(20), records(5, 1)), tmp_path, synthetic=pool)
    data.setup("test")
    assert data.describe()["synthetic_pool"]["manifest"] == "no manifest"
