"""A data set of the user: read in both forms, refused in one line where something is missing, and trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from harness.records.record import read_status
from harness.resolve.compose import ConfigError, compose_run
from harness.tasks.train.entry import execute
from harness.tasks.train.folder import DataError, load_pixels, read_folder
from tests.fixtures.training import COLOURS, TINY, offline_runs, square, summary_of


def metadata(folder: Path, *rows: object) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_captions_beside_the_images(squares: Path) -> None:
    found = read_folder(squares, 64)
    assert [(row.file_name, row.name, row.caption) for row in found] == [
        (f"{name}.png", f"a {name} square", f"a {name} square") for name in sorted(COLOURS)
    ]
    assert all(row.vocabulary and not row.style and not row.tags for row in found)
    generated = load_pixels(squares, found)
    assert generated.shape == (4, 64, 64, 3)
    assert tuple(generated[sorted(COLOURS).index("red"), 32, 32]) == COLOURS["red"]


def test_metadata_says_what_it_has(squares: Path) -> None:
    full = {
        "file_name": "blue.png",
        "caption": "b, flat",
        "name": "b",
        "style": "flat",
        "tags": ["sky"],
        "licence": "MIT",
    }
    metadata(squares, {"file_name": "red.png", "caption": "a red one"}, {**full, "vocabulary": False})
    red, blue = read_folder(squares, 64)
    assert (red.name, red.style, red.tags, red.licence, red.vocabulary) == ("a red one", "", (), "", True)
    assert (blue.name, blue.style, blue.tags, blue.licence, blue.vocabulary) == ("b", "flat", ("sky",), "MIT", False)


def test_what_is_transparent_becomes_white(squares: Path) -> None:
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(squares / "red.png")
    metadata(squares, {"file_name": "red.png", "caption": "nothing"})
    assert np.array_equal(load_pixels(squares, read_folder(squares, 64)), np.full((1, 64, 64, 3), 255))


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_folder(folder, 64)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_image_without_a_caption_is_refused(squares: Path) -> None:
    (squares / "green.txt").write_text("  \n")
    assert "green.png: no caption; write one into green.txt" in refused(squares)
    (squares / "green.txt").unlink()
    assert "green.png: no caption; write one into green.txt" in refused(squares)


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"file_name": "red.png"}, "line 2: Object missing required field `caption`"),
        ({"file_name": "red.png", "caption": " "}, "the caption of red.png is empty"),
        ({"file_name": "red.png", "caption": "a", "tags": "b"}, "line 2: Expected `array`, got `str`"),
        ("{", "line 2: Input data was truncated"),
        ({"file_name": "none.png", "caption": "a"}, "none.png: not a readable image (FileNotFoundError)"),
        ({"file_name": "red.txt", "caption": "a"}, "red.txt: not a readable image (UnidentifiedImageError)"),
        ({"file_name": "../outside.png", "caption": "a"}, "../outside.png is outside the folder"),
        ({"file_name": "small.png", "caption": "a"}, "small.png is 32 x 32 pixels, train.data.size=64"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_refused(squares: Path, row: object, hint: str) -> None:
    square((0, 0, 0)).save(squares.parent / "outside.png")
    square((0, 0, 0), 32).save(squares / "small.png")
    metadata(squares, {"file_name": "blue.png", "caption": "a blue square"}, row)
    assert hint in refused(squares)


def test_no_images_are_refused(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "none")
    assert "no images" in refused(tmp_path)


def test_nothing_to_learn_is_refused(squares: Path) -> None:
    metadata(squares, {"file_name": "red.png", "caption": "a", "vocabulary": False})
    assert "nothing to learn" in refused(squares)


def train(folder: Path, data: Path, *overrides: str) -> str:
    """Train with the whole configuration, and return the final state."""
    paths = [f"train.folder={folder}", f"train.data.folder={data}", f"train.export={folder / 'model'}"]
    composed = compose_run([*TINY, *paths, *overrides])
    return execute(composed, Console(quiet=True)).state


def test_a_folder_is_trained_on_to_the_end(squares: Path, tmp_path: Path) -> None:
    """Every part runs except the shared ones; the curve, the sheets and the end are in wandb's offline run."""
    folder, part = tmp_path / "run", "denoiser-sgm"
    short = ["train.denoiser.loop.images=32", "train.denoiser.loop.log_every=2", "train.denoiser.sample_every=16"]
    assert train(folder, squares, "scheduler=sgm", "logger.wandb.mode=offline", *short) == "ok"
    assert read_status(folder).state == "ok"
    result = json.loads((folder / "result.json").read_text())
    assert list(result) == ["data", "denoiser", "export", "score"]
    assert (result["data"]["images"], result["denoiser"]["images"], result["score"]["prompts"]) == (4, 32, 4)
    for name in ("transformer_sgm", "scheduler_sgm", "vae", "text_encoder", "tokenizer"):
        assert (folder / "model" / name).is_dir(), name
    assert (folder / "model" / "vocabulary.txt").read_text().splitlines() == [f"a {c} square" for c in sorted(COLOURS)]
    (log,) = offline_runs(folder)
    summary = summary_of(log)
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert [line["images"] for line in curve] == [8, 16, 24, 32]
    assert (summary["state"], summary["exit_code"], summary["summary"]["state"]) == ("finished", 0, "ok")
    for name in ("loss", "lr", "images_per_s", "images"):
        assert summary["summary"][f"{part}/{name}"] == curve[-1][name]
    assert summary["summary"][f"{part}/samples"]["format"] == "png"
    assert summary["config"]["scheduler"]["family"] == "sgm"
    for images in (16, 32):
        with Image.open(folder / "samples" / f"{part}-{images}.png") as sheet:
            assert min(sheet.size) > 128


def test_sheets_leave_the_training_as_it_is(squares: Path, tmp_path: Path) -> None:
    alike = ["train.parts=[denoiser]", "train.denoiser.loop.images=24", "logger=json"]
    for every, name in ((0, "without"), (8, "with")):
        assert train(tmp_path / name, squares, *alike, f"train.denoiser.sample_every={every}") == "ok"
    weights = "denoiser-rectified_flow.safetensors"
    assert not (tmp_path / "without" / "samples").exists()
    assert len(list((tmp_path / "with" / "samples").iterdir())) == 3
    assert tensors(tmp_path / "without" / weights) == tensors(tmp_path / "with" / weights)


def tensors(path: Path) -> dict[str, bytes]:
    from harness.tasks.train.loop import read_checkpoint

    return {name: tensor.numpy().tobytes() for name, tensor in read_checkpoint(path)[0].items()}


def test_a_wrong_training_ends_in_one_line(squares: Path, tmp_path: Path) -> None:
    short = ["train.denoiser.loop.images=16", "train.vae.loop.images=32"]
    assert train(tmp_path / "run", squares, "logger=json", *short, "train.data.size=32") == "failed"
    error = read_status(tmp_path / "run").error
    assert error is not None
    assert "train.data.size=32" in error


@pytest.mark.parametrize(
    ("override", "hint"),
    [("train.parts=[vae]", "remove both parts"), ("train.base_model=/no/such/model", "no such folder")],
)
def test_parts_that_do_not_fit_the_base_model_are_refused_before_a_folder_is_made(
    squares: Path, tmp_path: Path, override: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint):
        train(tmp_path / "run", squares, override)
    assert not (tmp_path / "run").exists()


def test_the_mirror_may_fail_and_the_training_goes_on(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def broken(*arguments: object, **named: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(wandb.Run, "log", broken)
    short = ["train.parts=[denoiser]", "train.denoiser.loop.images=16", "train.denoiser.loop.log_every=1"]
    assert train(tmp_path / "run", squares, "logger.wandb.mode=offline", *short) == "ok"
    assert capsys.readouterr().err.count("wandb did not take it") == 1
