"""All parts in order on coloured squares: what each leaves behind; a second run repeats nothing."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast

from harness.config.train import (
    DataConfig,
    DenoiserConfig,
    LoopConfig,
    ScoreConfig,
    TextConfig,
    TrainConfig,
    VaeConfig,
)
from harness.metrics.gallery import FILE, Gallery
from harness.tasks.train.captions import caption
from harness.tasks.train.emoji import STYLES
from harness.tasks.train.folder import CaptionedImage
from harness.tasks.train.run import PARTS, RECIPES, run
from schedulers.options import option_of
from schedulers.settings import NoiseSchedulerSettings
from tests.fixtures.training import captioned

FLOW = NoiseSchedulerSettings("rectified_flow")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (230, 220, 30)}


def write_squares(folder: Path) -> None:
    """Return two names for each colour: one in the vocabulary, one that only the VAE sees."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for colour, value in COLOURS.items():
        for name, chosen in ((f"{colour} square", True), (f"dark {colour} square", False)):
            for style in STYLES:
                image = np.full((64, 64, 3), 255, np.uint8)
                image[8:56, 8:56] = np.array(value) // (1 if chosen else 2)
                file_name = f"images/{name}-{style}.png"
                Image.fromarray(image).save(folder / file_name)
                rows.append(CaptionedImage(file_name, name, style, (colour,), caption(name, style), "MIT", chosen))
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(asdict(row)) for row in rows) + "\n")


def write_teacher(folder: Path) -> None:
    """Make an untrained BERT that knows the words of the squares."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *COLOURS, "square", "dark", "noto", "the", "of"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(sizes).save_pretrained(folder)


def short() -> LoopConfig:
    """Return the overrides of a training of four steps."""
    return LoopConfig(images=32, batch=8, warmup=1, log_every=2)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    root = tmp_path_factory.mktemp("train")
    write_squares(root / "data")
    write_teacher(root / "teacher")
    return TrainConfig(
        folder=str(root / "run"),
        export=str(root / "model"),
        data=DataConfig(folder=str(root / "data")),
        vae=VaeConfig(channels=[8, 8, 16], held_out=2, loop=short()),
        text=TextConfig(
            teacher=str(root / "teacher"), vocabulary=320, width=32, depth=1, heads=2, hidden=32, loop=short()
        ),
        denoiser=DenoiserConfig(width=32, depth=1, heads=2, text_channels=32, loop=short()),
        score=ScoreConfig(prompts=6, steps=2),
    )


def test_all_parts_run_and_a_second_run_trains_no_further(config: TrainConfig) -> None:
    first = run(config, FLOW)
    assert list(first) == list(PARTS)
    assert first["data"] == {"images": 16, "vocabulary_images": 8}
    assert first["denoiser"]["steps"] == 4
    assert first["score"]["prompts"] == 6
    assert first["score"]["chance"] == pytest.approx(1 / 4)
    assert json.loads((Path(config.folder) / "result.json").read_text()) == first
    assert (Path(config.export) / "model_index.json").exists()
    assert set(Gallery.load(Path(config.export) / FILE).names) == {f"{colour} square" for colour in COLOURS}
    curve = (Path(config.folder) / "curve.jsonl").read_text()
    checkpoints = {path: path.read_bytes() for path in Path(config.folder).glob("*.safetensors")}
    assert {path.stem for path in checkpoints} == {"vae", "text", "denoiser-rectified_flow"}
    second = run(config, FLOW)
    assert second == first
    assert (Path(config.folder) / "curve.jsonl").read_text() == curve


def test_the_words_of_the_configuration_are_what_runs() -> None:
    declared = {field.name: option_of(field).words for kind in (TrainConfig, DataConfig) for field in fields(kind)}
    assert declared["parts"] == tuple(PARTS)
    assert declared["recipe"] == tuple(RECIPES)


def test_captions_alone_are_enough_for_every_part(config: TrainConfig, tmp_path: Path) -> None:
    """Without styles, tags and names outside the vocabulary there is no held-out image to report on."""
    data = DataConfig(folder=str(captioned(tmp_path / "data")), recipe=None)
    own = replace(config, data=data, folder=str(tmp_path / "run"), export=str(tmp_path / "model"))
    result = run(own, NoiseSchedulerSettings("ddpm"))
    assert list(result) == list(PARTS)
    assert "held_out_psnr_db" not in result["vae"]
    assert (result["score"]["prompts"], result["score"]["family"]) == (4, "ddpm")
    assert (tmp_path / "model" / "styles.txt").read_text() == ""
