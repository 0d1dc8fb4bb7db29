"""Features computed once: recognised, whole, shared, private."""

import contextlib
import logging
import multiprocessing
import stat
import threading
import time
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_dp.data import Digits, DPDataModule
from lightning_dp.data.features import FeatureCache
from lightning_dp.data.fingerprint import Digest
from lightning_dp.data.transforms import Normalize
from lightning_dp.errors import ConfigError
from tests.data.made import Made, records

CPU = torch.device("cpu")
NORMALIZE = Normalize((0.5,), (0.25,))


class Scorer(nn.Module):
    """Three features an image; the class counts its calls, for a counter of the module would be part of its digest."""

    calls = 0

    def __init__(self, seed=0, scale=1.0, shift=0.0):
        super().__init__()
        self.layer = nn.Linear(16, 3)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.layer.bias)
        self.scale = scale
        self.register_buffer("shift", torch.full((3,), shift), persistent=False)

    def forward(self, images):
        Scorer.calls += 1
        return self.layer(images.flatten(1)) * self.scale + self.shift


def features(folder, encoder=None, images=None, normalize=NORMALIZE, dtype="float32", batch_size=7):
    images = records(20).images if images is None else images
    encoder = Scorer() if encoder is None else encoder
    return FeatureCache(folder, dtype).features(images, encoder, normalize, batch_size, CPU)


def files(folder, ending=".npy"):
    return sorted(folder.glob(f"*{ending}"))


def expected(encoder=None, images=None):
    images = records(20).images if images is None else images
    with torch.no_grad():
        return (Scorer() if encoder is None else encoder)(NORMALIZE(images))


def test_a_second_call_encodes_nothing(tmp_path):
    first = features(tmp_path)
    torch.testing.assert_close(first, expected())
    calls = Scorer.calls
    assert torch.equal(features(tmp_path), first)
    assert torch.equal(features(tmp_path, batch_size=3), first)  # performance only
    assert torch.equal(features(tmp_path, Scorer().train()), first)
    assert Scorer.calls == calls
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"encoder": Scorer(seed=1)},
        {"encoder": Scorer(scale=2.0)},
        {"encoder": Scorer(shift=1.0)},
        {"encoder": nn.Sequential(Scorer())},
        {"normalize": Normalize((0.5,), (0.5,))},
        {"images": records(20, seed=1).images},
        {"images": records(20).images.flip(0)},
        {"images": records(19).images},
        {"dtype": "float16"},
    ],
    ids=["weights", "attribute", "unsaved buffer", "structure", "constants", "images", "order", "number", "dtype"],
)
def test_whatever_changes_features_gets_a_file_of_its_own(tmp_path, changed):
    kept = features(tmp_path)
    calls = Scorer.calls
    features(tmp_path, **changed)
    assert Scorer.calls > calls
    assert len(files(tmp_path)) == 2
    calls = Scorer.calls
    assert torch.equal(features(tmp_path), kept)
    assert Scorer.calls == calls


def test_one_changed_pixel_is_noticed(tmp_path):
    images = records(20).images
    features(tmp_path, images=images)
    images[19, 0, 3, 3] ^= 1
    torch.testing.assert_close(features(tmp_path, images=images), expected(images=images))
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "a flipped bit", "a flipped bit of the header"])
def test_a_damaged_file_is_reported_and_made_again(tmp_path, caplog, damage):
    right = features(tmp_path).clone()
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    if damage.startswith("a flipped"):
        data[60 if damage.endswith("header") else 140] ^= 1
    path.write_bytes({"truncated": data[:-5], "empty": b""}.get(damage, data))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(features(tmp_path), right)
    assert "damaged" in caplog.text
    calls = Scorer.calls
    assert torch.equal(features(tmp_path), right)
    assert Scorer.calls == calls


def test_a_damaged_key_makes_new_files_rather_than_wrong_ones(tmp_path):
    right = features(tmp_path).clone()
    (tmp_path / "key").write_bytes(b"short")
    assert torch.equal(features(tmp_path), right)
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2**-10), ("bfloat16", 2**-7)])
def test_half_precision_is_kept_within_its_rounding_and_served_as_float32(tmp_path, dtype, tolerance):
    kept = features(tmp_path, dtype=dtype)
    assert kept.dtype == getattr(torch, dtype)
    torch.testing.assert_close(kept.float(), expected(), rtol=tolerance, atol=1e-6)
    assert torch.equal(features(tmp_path, dtype=dtype), kept)
    (path,) = files(tmp_path)
    assert path.stat().st_size == 128 + 20 * 3 * 2 + 32
    data = DPDataModule(Made(records(20), records(6, seed=1)), encoder=Scorer(), cache=tmp_path, feature_dtype=dtype)
    data.setup()
    assert data.role("private").images.dtype == torch.float32
    images, _ = next(iter(data.test_dataloader()[0]))
    assert images.dtype == torch.float32


def test_features_that_do_not_fit_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.feature_dtype float16 cannot hold .* use float32"):
        features(tmp_path, Scorer(scale=1e6), dtype="float16")
    assert files(tmp_path) == files(tmp_path, ".partial") == []


def test_files_are_for_their_owner_only_and_their_names_need_a_secret(tmp_path):
    for folder in (tmp_path / "one", tmp_path / "two"):
        features(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
        assert len((folder / "key").read_bytes()) == 32
    # the same records and encoder: with a digest of the content alone the names would agree
    assert files(tmp_path / "one")[0].name != files(tmp_path / "two")[0].name
    assert (tmp_path / "one" / "key").read_bytes() != (tmp_path / "two" / "key").read_bytes()


def test_serving_is_a_map_that_cannot_change_the_file(tmp_path):
    before = features(tmp_path).clone()
    features(tmp_path).zero_()
    assert torch.equal(features(tmp_path), before)


def test_a_record_has_the_same_features_in_any_company(tmp_path):
    images = records(20).images
    whole = features(tmp_path, images=images)
    images[3] += 100
    other = features(tmp_path, images=images)
    rows = torch.arange(20) != 3
    torch.testing.assert_close(other[rows], whole[rows], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(other[3], whole[3])


class BatchStatistics(nn.Module):
    def forward(self, images):
        normed = nn.functional.batch_norm(images, None, None, training=True)
        return normed.relu().mean((2, 3))


def test_features_that_depend_on_the_batch_are_refused_at_every_size(tmp_path):
    for size in (4, 224):  # over 224 x 224 pixels, noise has nearly the same statistics anywhere
        images = torch.zeros(2, 1, size, size, dtype=torch.uint8)
        with pytest.raises(ConfigError, match="depend on its batch"):
            features(tmp_path, BatchStatistics(), images)
    assert files(tmp_path) == []


def test_no_images_give_no_features_of_the_right_shape(tmp_path):
    assert features(tmp_path, images=records(0).images).shape == (0, 3)


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file cannot hold features .* set data\.cache") as caught:
        features(tmp_path / "file")
    assert "\n" not in str(caught.value)


class Interrupted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 3)

    def forward(self, images):
        if len(images) == 6:  # the last batch of 20 in sevens
            raise KeyboardInterrupt
        return self.layer(images.flatten(1))


def test_an_interruption_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        features(tmp_path, Interrupted())
    assert files(tmp_path) == files(tmp_path, ".partial") == []


class Slow(nn.Module):
    """Reports every call through a pipe, then takes its time."""

    pipe = None

    def __init__(self, pause):
        super().__init__()
        self.pause = pause

    def forward(self, images):
        if Slow.pipe is not None and len(images) == 7:
            Slow.pipe.send(len(images))
        time.sleep(self.pause)
        return images.flatten(1).sum(1, keepdim=True)


def start(folder):
    """Encode in another process; it starts by a fork, because imports take seconds."""
    ours, theirs = multiprocessing.Pipe()

    def run():
        Slow.pipe = theirs
        kept = features(folder, Slow(0.05))
        theirs.send(float(kept.double().sum()))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    theirs.close()
    return process, ours


def received(pipe):
    messages = []
    with contextlib.suppress(EOFError):
        while True:
            messages.append(pipe.recv())
    return messages


def test_of_two_processes_one_encodes_and_the_other_waits(tmp_path):
    both = [start(tmp_path) for _ in range(2)]
    outputs = [received(pipe) for _, pipe in both]
    for process, _ in both:
        process.join()
    assert sorted(output.count(7) for output in outputs) == [0, 2]
    assert outputs[0][-1] == outputs[1][-1]
    assert len(files(tmp_path)) == 1


def test_a_killed_process_holds_nobody_up_and_leaves_no_features(tmp_path):
    process, pipe = start(tmp_path)
    assert pipe.recv() == 7
    process.kill()
    process.join()
    assert files(tmp_path) == []
    assert len(files(tmp_path, ".partial")) == 1
    torch.testing.assert_close(features(tmp_path, Slow(0.05)), expected(Slow(0)))
    assert files(tmp_path, ".partial") == []
    assert len(files(tmp_path)) == 1


def test_roles_and_their_order_are_those_of_the_raw_images(tmp_path):
    def digits(**settings):
        data = DPDataModule(
            Digits(),
            root=tmp_path,
            audit=50,
            public_per_class=3,
            validation="private",
            validation_private=20,
            **settings,
        )
        data.setup()
        return data

    class Flat(nn.Module):
        def forward(self, images):
            return images.flatten(1)

    raw, served = digits(), digits(encoder=Flat())
    for name in ("private", "public", "validation", "test", "audit"):
        assert torch.equal(served.role(name).images, raw.normalize(raw.role(name).images).flatten(1))
        assert torch.equal(served.role(name).labels, raw.role(name).labels)
    assert served.describe()["split_digest"] == raw.describe()["split_digest"]
    assert len(files(tmp_path / ".cache" / "features")) == 2


def test_roles_index_the_map_without_copying_it(tmp_path):
    data = DPDataModule(Made(records(30), records(6, seed=1)), audit=5, encoder=Scorer(), cache=tmp_path)
    data.setup()
    parts = [data._datasets[name].records.images for name in ("private", "audit")]
    assert parts[0].data_ptr() == parts[1].data_ptr()


def test_digests_tell_kinds_apart():
    values = [1, "1", 1.0, True, None, b"1", [1], (1, 1), ["1", 1], torch.ones(1), torch.ones(1, 1)]
    values += [torch.ones(1, dtype=torch.float64), torch.tensor(1.0), np.ones(1), torch.relu, nn.ReLU(), nn.ReLU]
    assert len({Digest().add(value).hexdigest() for value in values}) == len(values)
    assert Digest().add(["ab", "c"]).hexdigest() != Digest().add(["a", "bc"]).hexdigest()
    assert Digest().add({1, 2}).hexdigest() == Digest().add({2, 1}).hexdigest()


def with_attribute(value):
    encoder = Scorer()
    encoder.extra = value
    return encoder


def by_closure(scale):
    return lambda x: x * scale


def ring(scale):
    space = SimpleNamespace(scale=scale)
    space.itself = [space]
    return space


@pytest.mark.parametrize(
    "make",
    [
        lambda scale: SimpleNamespace(scale=scale),
        lambda scale: partial(torch.mul, scale),
        lambda scale: partial(torch.add, alpha=scale),
        lambda scale: [{"deep": SimpleNamespace(inside=partial(torch.mul, scale))}],
        by_closure,
        ring,
        lambda scale: torch.full((2,), scale).mul,
        lambda scale: Fraction(scale),
        lambda scale: (lambda x: x * 2) if scale == 1.0 else (lambda x: x * 3),
        lambda scale: with_attribute(SimpleNamespace(scale=scale)).forward,
    ],
    ids=["namespace", "args", "keywords", "deep", "closure", "ring", "tensor method", "slots", "code", "method"],
)
def test_encoders_that_differ_in_an_object_share_no_file(make):
    digests = [Digest().add(with_attribute(make(scale))).hexdigest() for scale in (1.0, 2.0, 1.0)]
    assert digests[0] == digests[2]
    assert digests[0] != digests[1]


def test_encoders_that_cannot_be_recognised_are_refused(tmp_path):
    hooked = [nn.Sequential(Scorer()), nn.Sequential(Scorer())]
    hooked[0][0].register_forward_hook(lambda module, args, output: 2 * output)
    hooked[1][0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    for encoder in hooked:
        with pytest.raises(ConfigError, match=r"forward hook on 0 \(Scorer\).* remove it"):
            features(tmp_path, encoder)
    with pytest.raises(ConfigError, match=r"holds a _thread\.lock.* keep plain values") as caught:
        features(tmp_path, with_attribute(threading.Lock()))
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == []
