"""The table of what a release teaches; no private file is opened."""

import pytest
import torch

from lightning_dp.cli import main
from lightning_dp.data import Digits, Published
from lightning_dp.models import small_networks


@pytest.fixture
def release(tmp_path):
    torch.manual_seed(0)
    records = Digits().load(tmp_path, train=True, download=False)
    source = Digits()
    chosen = torch.cat([(records.labels == k).nonzero()[:5, 0] for k in range(10)])
    images = (records.images[chosen].float() / 255 - source.mean[0]) / source.std[0]
    targets = torch.nn.functional.one_hot(records.labels[chosen], 10).float()
    about = {"kind": "images", "shape": None, "method": "PSG", "encoder": None, "guarantee": "epsilon 1 at delta 1e-5"}
    Published(images, targets, about).save(tmp_path / "release")
    return tmp_path / "release"


def test_the_table_has_each_network_with_its_error_and_the_guarantee(release, tmp_path, capsys, monkeypatch):
    opened, original = [], Digits.load
    monkeypatch.setattr(
        Digits,
        "load",
        lambda self, root, train, download: (opened.append((train, root)), original(self, root, train, download))[1],
    )
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(tmp_path / "elsewhere"))
    main(
        [
            *("downstream", f"--release={release}", "--source=Digits", "--networks=[MLP]", "--repeats=2"),
            *("--training.epochs=150", "--training.lr=0.05", f"--output={tmp_path / 'table.md'}"),
        ]
    )
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.startswith("PSG: epsilon 1 at delta 1e-5")
    name, accuracy, runs = table.splitlines()[-1].strip("| ").split(" | ")
    assert (name, runs) == ("MLP", "2")
    mean, error = (float(word) for word in accuracy.split(" ± "))
    assert mean > 60
    assert error >= 0
    assert opened == [(False, tmp_path / "elsewhere")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--networks=[GRU]", "GRU is not among ConvNet"),
        ("--repeats=0", "at least 1"),
        ("--release=nowhere", "cannot be read"),
    ],
)
def test_refusals(release, given, message):
    words = [f"--release={release}"] if "release" not in given else []
    with pytest.raises(SystemExit, match=message):
        main(["downstream", *words, "--source=Digits", given])


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_networks_take_small_images_and_can_all_be_drawn_anew(channels, size):
    from lightning_dp.methods.release_training import check_resettable, reset

    for name, net in small_networks(channels, size, 7).items():
        assert net(torch.zeros(2, channels, size, size)).shape == (2, 7), name
        check_resettable(net)
        reset(net, 1)
        first = [value.clone() for value in net.parameters()]
        reset(net, 2)
        assert any(not torch.equal(a, b) for a, b in zip(first, net.parameters(), strict=True))
        reset(net, 1)
        assert all(torch.equal(a, b) for a, b in zip(first, net.parameters(), strict=True))
        assert not any("BatchNorm" in type(module).__name__ for module in net.modules())
