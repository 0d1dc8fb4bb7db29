"""The synthetic pool from end to end, on tiny sizes."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_dp.cli import main
from lightning_dp.data import Digits, FlatFolder, Source
from lightning_dp.errors import ConfigError
from lightning_dp.generate import generate
from lightning_dp.generators import Ask, TextToImage, TrainedDiffusion

diffusers = pytest.importorskip("diffusers")
BaseOutput = pytest.importorskip("diffusers.utils").BaseOutput

ROOT = Path(__file__).parents[1]
QUIET = "--trainer.enable_progress_bar=false --trainer.enable_model_summary=false --trainer.accelerator=cpu"
BASE = f"-c {ROOT}/configs/base.yaml {QUIET}"


def run(line):
    main(line.split())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIGHTNING_DP_DATA", raising=False)
    monkeypatch.setattr("sys.argv", ["lightning-dp"])
    return tmp_path


@pytest.fixture
def pipeline(here, monkeypatch):
    from tests.tiny_pipeline import TinyTextToImage, save_tiny_pipeline

    monkeypatch.setattr(diffusers, "TinyTextToImage", TinyTextToImage, raising=False)
    save_tiny_pipeline(here / "tiny")
    return here / "tiny"


def every_source(base=Source):
    return [base, *(found for each in base.__subclasses__() for found in every_source(each))]


def read(pool):
    return {path.name: path.read_bytes() for path in pool.glob("*.png")}


def text_to_image(pipeline, out="pool", **changed):
    settings = {"steps": 2, "size": 16, "guidance": 3.0} | changed
    words = [f"--generator.{name}={value}" for name, value in settings.items()]
    line = f"generate --out={out} --classes=[cat,dog,owl] --per_class=3 --batch_size=4 --device=cpu"
    main([*line.split(), "--generator=TextToImage", f"--generator.model={pipeline}", *words])


def test_a_pipeline_fills_a_pool_without_opening_any_data_set(here, pipeline, monkeypatch):
    for source in every_source():
        monkeypatch.setattr(source, "load", lambda *_: pytest.fail("a data set was opened"))
    text_to_image(pipeline)
    pool = here / "pool"
    assert sorted(read(pool)) == [f"{index:06d}_{label}.png" for index in range(3) for label in range(3)]
    manifest = json.loads((pool / "manifest.json").read_text())
    assert manifest["generator"]["prompts"] == ["A photo of a cat", "A photo of a dog", "A photo of a owl"]
    assert (manifest["format"], manifest["per_class"], manifest["seed"]) == (1, 3, 0)
    assert Image.open(pool / "preview" / "grid.png").size == (3 * 18 + 2, 3 * 18 + 2)
    events = EventAccumulator(str(pool / "preview")).Reload()
    assert events.Tags()["images"] == ["pool/samples"]
    monkeypatch.undo()
    assert len(FlatFolder(pool, 3, 16).load(here, True, False)) == 9


def test_an_interrupted_pool_is_finished_with_the_same_images(here, pipeline):
    text_to_image(pipeline)
    pool = here / "pool"
    whole = read(pool)
    assert len(set(whole.values())) == 9
    for name in sorted(whole)[1::2]:
        (pool / name).unlink()
    kept = (pool / sorted(whole)[0]).stat().st_mtime_ns
    text_to_image(pipeline)
    assert read(pool) == whole
    assert (pool / sorted(whole)[0]).stat().st_mtime_ns == kept
    assert not list(pool.glob("**/*.draft"))


def test_a_pool_that_was_killed_before_its_manifest_is_finished(here, pipeline):
    (here / "pool").mkdir()
    (here / "pool" / ".manifest.json.draft").write_text('{"for')
    text_to_image(pipeline)
    assert len(read(here / "pool")) == 9
    assert not list(here.glob("pool/.*"))


def test_other_weights_in_the_same_folder_are_another_pool(here, pipeline):
    text_to_image(pipeline)
    weights = next(pipeline.rglob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SystemExit, match="holds a pool made with other weights: choose a new folder"):
        text_to_image(pipeline)


def test_an_image_does_not_depend_on_the_batch_or_on_the_number_of_images(here, pipeline):
    generator = TextToImage(str(pipeline), steps=2, size=16)
    for out, count, batch in (("one", 3, 1), ("many", 4, 8)):
        generate(here / out, generator, ["cat", "dog"], count, batch_size=batch)
    for path in (here / "one").glob("*.png"):
        first, second = (np.asarray(Image.open(each)).astype(int) for each in (path, here / "many" / path.name))
        assert abs(first - second).max() <= 1


def test_prompt_and_seed_reach_the_images(here, pipeline):
    text_to_image(pipeline)
    text_to_image(pipeline, "other", prompt="A drawing of a {class}")
    first, other = read(here / "pool"), read(here / "other")
    assert all(first[name] != other[name] for name in first)
    assert Ask(0, "cat", 0, 0).stream() != Ask(0, "cat", 0, 1).stream()


def test_another_pool_is_never_overwritten(here, pipeline):
    text_to_image(pipeline)
    before = read(here / "pool")
    with pytest.raises(SystemExit, match="holds a pool made with other steps: choose a new folder"):
        text_to_image(pipeline, steps=3)
    (here / "full").mkdir()
    (here / "full" / "letter.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds other files: choose a new folder"):
        text_to_image(pipeline, "full")
    assert read(here / "pool") == before
    assert [path.name for path in (here / "full").iterdir()] == ["letter.txt"]


class Checked:
    """A pipeline whose safety checker flags the first draws of some prompts."""

    def __init__(self, flags):
        self.flags, self.drawn = flags, []

    def __call__(self, prompt, height, width, generator, **settings):
        self.drawn.append(list(prompt))
        seeds = [each.initial_seed() for each in generator]
        images = np.stack([np.full((height, width, 3), seed % 250 / 255) for seed in seeds])
        return Images(images, [len(self.drawn) <= self.flags.get(text[-1], 0) for text in prompt])


@dataclass
class Images(BaseOutput):
    images: np.ndarray
    nsfw_content_detected: list


def asks(*names):
    return [Ask(label, name, 0, 0) for label, name in enumerate(names)]


def test_what_the_safety_checker_flags_is_drawn_again_from_the_next_seed():
    generator = TextToImage("none", size=8)
    generator._pipeline = Checked({"b": 2})
    made = generator.sample(asks("a", "b", "c"))
    assert generator._pipeline.drawn == [[f"A photo of a {name}" for name in names] for names in ("abc", "b", "b")]
    expected = [ask.stream(attempt) % 250 for ask, attempt in zip(asks("a", "b", "c"), (0, 2, 0), strict=True)]
    assert made[:, 0, 0, 0].tolist() == expected


def test_what_is_always_flagged_ends_the_run():
    generator = TextToImage("none", size=8)
    generator._pipeline = Checked({"b": 99})
    with pytest.raises(ConfigError, match="flagged class 'b' 10 times in a row"):
        generator.sample(asks("a", "b"))


def test_a_diffusion_model_is_trained_on_public_data_and_feeds_a_private_run(here):
    run(
        f"fit {BASE} --data=PublicDataModule --data.source=Digits --data.batch_size=32 --model=ClassDiffusion "
        "--model.num_classes=10 --model.image_size=8 --model.widths=[16] --trainer.max_epochs=1 "
        "--trainer.limit_train_batches=4"
    )
    logs = here / "runs" / "version_0"
    assert not [path for path in logs.iterdir() if "privacy" in path.name or "ledger" in path.name]
    checkpoint = logs / "checkpoints" / "last.ckpt"
    stored = torch.load(checkpoint, weights_only=True)
    assert stored["PublicDataModule"]["source"] == "Digits"
    assert "privacy" not in stored
    run(
        "generate --out=pool --classes=[a,b,c,d,e] --per_class=2 --device=cpu --generator=TrainedDiffusion "
        f"--generator.checkpoint={checkpoint} --generator.steps=2"
    )
    manifest = json.loads((here / "pool" / "manifest.json").read_text())
    assert manifest["generator"]["trained_on"] == stored["PublicDataModule"]
    private = (
        f"fit {BASE} -c {ROOT}/configs/data/digits.yaml -c {ROOT}/configs/method/dp_sgd.yaml --privacy.steps=2 "
        "--privacy.delta=1e-5 --privacy.noise_multiplier=8 --data.init_args.synthetic=FlatFolder "
        f"--data.init_args.synthetic.folder={here}/pool --data.init_args.synthetic.num_classes=5 "
        "--data.init_args.synthetic.image_size=8 --data.init_args.synthetic.channels=1"
    )
    with pytest.raises(SystemExit, match="trained on Digits, the private source"):
        run(private)
    manifest["generator"]["trained_on"] = {"source": "USPS", "digest": "0"}
    (here / "pool" / "manifest.json").write_text(json.dumps(manifest))
    run(private)
    card = json.loads(next(here.glob("runs/*/privacy_card.json")).read_text())
    digest = hashlib.blake2b((here / "pool" / "manifest.json").read_bytes(), digest_size=16).hexdigest()
    assert card["data"]["synthetic_pool"]["manifest"] == digest
    assert card["data"]["sizes"]["synthetic"] == 10


def test_private_data_and_models_without_privacy_do_not_meet(here, monkeypatch):
    monkeypatch.setattr(Digits, "load", lambda *_: pytest.fail("a data set was opened"))
    with pytest.raises(SystemExit, match="ClassDiffusion learns without privacy, but DPDataModule serves private"):
        run(
            f"fit {QUIET} --data=DPDataModule --data.source=Digits --model=ClassDiffusion --model.num_classes=10 "
            "--model.image_size=8 --model.widths=[16] --trainer.max_epochs=1"
        )


COMPLETE = "--privacy.num_examples=1000 --privacy.expected_batch_size=100 --privacy.steps=1 --privacy.delta=1e-5"
SECTIONS = {
    f"{COMPLETE} --privacy.epsilon=3": r"ClassDiffusion trains without privacy: take the privacy section out",
    "--privacy.epsilon=3": "is incomplete: .* or, for a model that trains without privacy, take the section out",
}


@pytest.mark.parametrize(("given", "message"), SECTIONS.items())
def test_a_model_without_privacy_takes_no_privacy_section(here, monkeypatch, given, message):
    monkeypatch.setattr(Digits, "load", lambda *_: pytest.fail("a data set was opened"))
    with pytest.raises(SystemExit, match=message):
        run(
            f"fit {QUIET} --data=PublicDataModule --data.source=Digits --model=ClassDiffusion --model.num_classes=10 "
            f"--model.image_size=8 --model.widths=[16] --trainer.max_epochs=1 {given}"
        )


def test_a_private_method_still_needs_its_section(here):
    parts = f"-c {ROOT}/configs/data/digits.yaml -c {ROOT}/configs/method/dp_sgd.yaml"
    with pytest.raises(SystemExit, match=r"the privacy section is incomplete: set privacy\.delta") as stopped:
        run(f"fit {BASE} {parts}")
    assert "\n" not in str(stopped.value)
    bare = (
        f"fit {BASE} --data=DPDataModule --data.source=Digits --model.net=LinearHead --model.net.in_channels=1 "
        "--model.net.size=8 --model.net.num_classes=10 --model.optimizer=torch.optim.SGD --model.optimizer.lr=1"
    )
    with pytest.raises(SystemExit, match=r"no privacy section|needs the privacy section"):
        run(bare)
    with pytest.raises(SystemExit, match=r"incomplete: set privacy\.num_examples, .*privacy\.delta"):
        run(f"{bare} --privacy.epsilon=1")
    assert not list(here.glob("runs/**/*.ckpt"))


BAD = {
    "classes must name every class once": ["--classes=[cat, cat]"],
    "per_class and --batch_size must be at least 1": ["--per_class=0"],
    "does not name the class": ["--generator.prompt=a cat"],
    "nowhere could not be read": [],
    "generator.steps must be at least 1": ["--generator.steps=0"],
}


@pytest.mark.parametrize(("message", "given"), BAD.items())
def test_mistakes_are_answered_in_one_line(here, monkeypatch, message, given):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plain = ["--out=pool", "--classes=[cat, dog]", "--per_class=2", "--generator=TextToImage"]
    with pytest.raises(SystemExit, match=message) as stopped:
        main(["generate", *plain, f"--generator.model={here / 'nowhere'}", *given])
    assert str(stopped.value).startswith("error: ")
    assert "\n" not in str(stopped.value)
    assert not (here / "pool").exists()


def test_checkpoints_that_saw_other_data_are_refused(here):
    torch.save({"hyper_parameters": {}, "DPDataModule": {}}, here / "private.ckpt")
    with pytest.raises(ConfigError, match="was not trained on PublicDataModule"):
        generate(here / "pool", TrainedDiffusion(here / "private.ckpt"), ["a"], 1)
    with pytest.raises(ConfigError, match="cannot be read"):
        generate(here / "pool", TrainedDiffusion(here / "nowhere.ckpt"), ["a"], 1)
    known = {"hyper_parameters": {"num_classes": 1}, "PublicDataModule": {"source": "Digits", "digest": "0"}}
    torch.save(known, here / "one.ckpt")
    with pytest.raises(ConfigError, match=r"names 2, but .* knows 1"):
        generate(here / "pool", TrainedDiffusion(here / "one.ckpt"), ["a", "b"], 1)
    assert not (here / "pool").exists()
