from functools import partial

import pytest
import torch
from pytorch_lightning import Trainer

from lightning_dp.data import Digits, DPDataModule, PublicDataModule
from lightning_dp.errors import ConfigError
from lightning_dp.methods import ClassDiffusion
from tests.methods.runs import make_data

pytest.importorskip("diffusers")

TINY = {"num_classes": 10, "image_size": 8, "widths": (16,), "patch": 2, "lr": 2e-3}


def trainer(folder, steps=2):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(max_steps=steps, accelerator="cpu", enable_model_summary=False, default_root_dir=folder, **quiet)


def fit(folder, steps=2, **settings):
    torch.manual_seed(0)
    model = ClassDiffusion(**TINY | settings)
    trainer(folder, steps).fit(model, datamodule=PublicDataModule(Digits(), batch_size=64))
    return model


def weights(model):
    return torch.cat([value.detach().reshape(-1) for value in model.parameters()])


def test_training_is_a_function_of_its_seeds(tmp_path):
    torch.manual_seed(1)
    first = weights(fit(tmp_path))
    assert torch.equal(first, weights(fit(tmp_path)))
    assert not torch.equal(first, weights(fit(tmp_path, seed=1)))


@pytest.mark.parametrize(("size", "widths", "patch"), [(8, (16,), 1), (7, (16, 16), 2), (5, (16,), 4)])
def test_any_size_is_padded_inside_and_comes_back(size, widths, patch):
    model = ClassDiffusion(3, size, channels=3, widths=widths, patch=patch)
    noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = model.eval().sample(torch.tensor([0, 2]), noise, steps=2, guidance=1.5)
    assert images.shape == (2, 3, size, size)
    assert images.dtype == torch.uint8


def test_an_image_does_not_depend_on_its_batch():
    model = ClassDiffusion(**TINY).eval()
    noise = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5)
    together = model.sample(labels, noise, 4, 2.0)
    alone = torch.cat([model.sample(labels[i : i + 1], noise[i : i + 1], 4, 2.0) for i in range(5)])
    assert (together.int() - alone.int()).abs().max() <= 1


def test_the_class_and_the_guidance_reach_the_network(tmp_path):
    model = fit(tmp_path, 20, widths=(8,)).eval()  # groups of one channel in the norm
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    first, second = model.sample(torch.tensor([0, 1]), noise, 4, 1.0)
    assert not torch.equal(first, second)
    assert not torch.equal(model.sample(torch.tensor([0, 1]), noise, 4, 3.0)[0], first)


def test_hidden_classes_are_as_many_as_asked_for(tmp_path, monkeypatch):
    seen = []
    forward = ClassDiffusion.forward
    monkeypatch.setattr(
        ClassDiffusion, "forward", lambda self, x, t, labels: seen.append(labels) or forward(self, x, t, labels)
    )
    fit(tmp_path, 8, unlabelled=0.5)
    share = (torch.cat(seen) == 10).float().mean()
    assert 0.4 < share < 0.6  # of 512 draws


def test_the_loss_falls(tmp_path):
    model, losses = ClassDiffusion(**TINY), []
    model.log = lambda name, value, **_: losses.append(float(value))
    trainer(tmp_path, 60).fit(model, datamodule=PublicDataModule(Digits(), batch_size=64))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_private_roles_are_refused_before_they_are_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(Digits, "load", lambda *_: pytest.fail("opened"))
    with pytest.raises(ConfigError, match="takes public data only: set data to PublicDataModule"):
        trainer(tmp_path).fit(ClassDiffusion(**TINY), datamodule=make_data())
    with pytest.raises(ConfigError, match="takes public data only"):
        trainer(tmp_path).fit(ClassDiffusion(**TINY), datamodule=DPDataModule(Digits()))


def test_a_checkpoint_goes_on_on_its_own_data_only(tmp_path, monkeypatch):
    first, model = trainer(tmp_path), ClassDiffusion(**TINY)
    first.fit(model, datamodule=PublicDataModule(Digits(), batch_size=64))
    first.save_checkpoint(tmp_path / "a.ckpt")

    def go_on(data):
        trainer(tmp_path, 3).fit(ClassDiffusion(**TINY), datamodule=data, ckpt_path=tmp_path / "a.ckpt")

    go_on(PublicDataModule(Digits(), batch_size=32))
    renamed = Digits()
    renamed.name = "Other"
    with pytest.raises(ConfigError, match=r"trained on other public data \(Digits, .*make a new run"):
        go_on(PublicDataModule(renamed, batch_size=64))
    side = Digits.load
    monkeypatch.setattr(Digits, "load", lambda self, root, train, download: side(self, root, False, download))
    with pytest.raises(ConfigError, match="trained on other public data"):
        go_on(PublicDataModule(Digits(), batch_size=64))


def test_plain_loaders_are_refused(tmp_path):
    loader = torch.utils.data.DataLoader([(torch.zeros(1, 8, 8), 0)])
    with pytest.raises(ConfigError, match="takes public data only"):
        trainer(tmp_path).fit(ClassDiffusion(**TINY), loader)


def test_data_of_another_shape_are_refused(tmp_path):
    model = ClassDiffusion(**TINY | {"num_classes": 9})
    with pytest.raises(ConfigError, match=r"\(9, 1, 8\), but Digits has \(10, 1, 8\)"):
        trainer(tmp_path).fit(model, datamodule=PublicDataModule(Digits()))


@pytest.mark.parametrize("wrong", [{"widths": (20,)}, {"widths": ()}, {"patch": 0}, {"unlabelled": 1.5}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"model"):
        partial(ClassDiffusion, **TINY | wrong)()
