from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_dp.data import cache
from lightning_dp.data.cache import decode_cached
from lightning_dp.errors import ConfigError
from tests.data.made import write_image


def make_files(folder, num=5):
    files = [folder / "images" / f"{index}.png" for index in range(num)]
    for index, file in enumerate(files):
        write_image(file, 10 * index)
    return files


def test_images_are_squares_in_order(tmp_path):
    images = decode_cached(make_files(tmp_path), 6, tmp_path / "cache", "made")
    assert images.shape == (5, 3, 6, 6)
    assert images.dtype == torch.uint8
    assert images[:, 0, 3, 3].tolist() == [0, 10, 20, 30, 40]
    assert images[:, 2, 3, 3].tolist() == [255, 245, 235, 225, 215]


def test_short_side_is_resized_and_the_centre_kept(tmp_path):
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert decode_cached([tmp_path / "wide.png"], 8, tmp_path / "cache", "made").min() == 255


def test_grey_and_transparent_images_become_rgb(tmp_path):
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "clear.png")
    images = decode_cached([tmp_path / "grey.png", tmp_path / "clear.png"], 4, tmp_path / "cache", "made")
    assert images[:, :, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


def test_second_call_decodes_nothing(tmp_path, monkeypatch):
    files = make_files(tmp_path)
    first = decode_cached(files, 6, tmp_path / "cache", "made")
    monkeypatch.setattr(cache, "_decode", None)
    assert torch.equal(decode_cached(files, 6, tmp_path / "cache", "made"), first)


def test_changed_file_or_size_is_decoded_again(tmp_path):
    files = make_files(tmp_path)
    decode_cached(files, 6, tmp_path / "cache", "made")
    assert decode_cached(files, 7, tmp_path / "cache", "made").shape[-1] == 7
    write_image(files[2], 99, size=(16, 16))
    assert decode_cached(files, 6, tmp_path / "cache", "made")[2, 0, 0, 0] == 99


def test_interrupted_decoding_leaves_nothing_behind(tmp_path, monkeypatch):
    files = make_files(tmp_path)

    def interrupted(file, image_size):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode_cached(files, 6, tmp_path / "cache", "made")
    assert list((tmp_path / "cache").iterdir()) == []
    assert decode_cached(files, 6, tmp_path / "cache", "made")[4, 0, 0, 0] == 40


def test_file_appears_only_when_complete_and_a_stale_one_is_harmless(tmp_path, monkeypatch):
    files, seen = make_files(tmp_path), []
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "made-6-0000.dead.tmp").write_bytes(b"half")
    decode = cache._decode

    def watching(file, image_size):
        seen.extend((tmp_path / "cache").glob("*.npy"))
        return decode(file, image_size)

    monkeypatch.setattr(cache, "_decode", watching)
    assert decode_cached(files, 6, tmp_path / "cache", "made")[4, 0, 0, 0] == 40
    assert seen == []
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_served_images_are_a_map_that_cannot_change_the_file(tmp_path):
    files = make_files(tmp_path)
    decode_cached(files, 6, tmp_path / "cache", "made").fill_(1)
    assert decode_cached(files, 6, tmp_path / "cache", "made")[0, 2, 0, 0] == 255


def test_no_files_give_no_images(tmp_path):
    assert decode_cached([], 6, tmp_path / "cache", "made").shape == (0, 3, 6, 6)


def test_broken_image_is_named(tmp_path):
    files = make_files(tmp_path)
    files[1].write_bytes(b"not an image")
    with pytest.raises(ConfigError, match=r"1\.png cannot be decoded"):
        decode_cached(files, 6, tmp_path / "cache", "made")


def test_folder_that_cannot_be_written_is_named(tmp_path):
    files = make_files(tmp_path)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"cache cannot be written to .*data\.root"):
        decode_cached(files, 6, Path(tmp_path / "cache"), "made")
