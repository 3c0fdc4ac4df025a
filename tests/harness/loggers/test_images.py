"""A data set in wandb and on the terminal: batches while it runs, one wandb run per folder, a table by category."""

import io
from pathlib import Path

import msgspec
import pytest
from PIL import Image
from rich.console import Console

from harness.config.schema import RunConfig, WandbConfig, WandbMode
from harness.loggers import images
from harness.loggers.images import BATCH, SHOWN, ImageMirror
from harness.loggers.run_names import wandb_id
from harness.loggers.table import print_dataset
from harness.metrics.intervals import wilson
from harness.metrics.summary import summarize
from harness.records.images import ImageRow
from harness.records.record import CategoryRow, DatasetRow


class RecordedRun:
    """Stands for a wandb run; it keeps what it is given."""

    def __init__(self) -> None:
        self.points: list[dict[str, object]] = []
        self.ended: list[int] = []
        self.axes: dict[str, str | None] = {}

    def define_metric(self, name: str, step_metric: str | None = None, **options: object) -> None:
        self.axes[name] = step_metric

    def log(self, point: dict[str, object]) -> None:
        self.points.append(point)

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


def rows(folder: Path, count: int) -> list[ImageRow]:
    (folder / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "samples/a.png")
    return [ImageRow(k, str(k), (), "rocket", "", k, 8, 8, "samples/a.png", "ab", 5.0) for k in range(count)]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[RecordedRun]:
    found: list[RecordedRun] = []

    def open_run(*arguments: object, **options: object) -> RecordedRun:
        found.append(RecordedRun())
        return found[-1]

    monkeypatch.setattr(images, "open_run", open_run)
    return found


def test_images_are_logged_in_batches(tmp_path: Path, opened: list[RecordedRun]) -> None:
    made = rows(tmp_path, 2 * BATCH + 20)
    with ImageMirror(WandbConfig(WandbMode.offline), tmp_path, RunConfig(), len(made)) as mirror:
        for row in made:
            mirror.add([row])
    (run,) = opened
    assert [point["images"] for point in run.points] == [BATCH, 2 * BATCH]
    assert run.points[0]["image_ms"] == 5.0
    assert {run.axes[name] for name in run.points[0] if name != "images"} == {"images"}
    shown = run.points[0]["batch"]
    assert isinstance(shown, list)
    assert 1 <= len(shown) <= SHOWN
    assert run.ended == [0]


@pytest.mark.parametrize(("mode", "count"), [(WandbMode.disabled, 2 * BATCH), (WandbMode.offline, BATCH)])
def test_nothing_is_opened_for_few_images_or_without_wandb(
    tmp_path: Path, opened: list[RecordedRun], mode: WandbMode, count: int
) -> None:
    with ImageMirror(WandbConfig(mode), tmp_path, RunConfig(), count) as mirror:
        mirror.add(rows(tmp_path, count))
    assert opened == []


def test_a_fault_of_wandb_ends_the_mirror_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(*arguments: object, **options: object) -> RecordedRun:
        calls.append(arguments)
        raise OSError("no space")

    monkeypatch.setattr(images, "open_run", broken)
    with ImageMirror(WandbConfig(WandbMode.offline), tmp_path, RunConfig(), 5 * BATCH) as mirror:
        for _ in range(3):
            mirror.add(rows(tmp_path, BATCH) if not calls else [])
    assert mirror.error == "no space"
    assert len(calls) == 1


def test_every_command_of_a_folder_has_one_wandb_run(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert wandb_id(tmp_path) == wandb_id(tmp_path)
    assert wandb_id(tmp_path) != wandb_id(tmp_path / "other")


def test_a_table_has_a_row_for_each_category() -> None:
    times = summarize([4.0, 5.0, 6.0, 7.0])
    categories = [CategoryRow("Arts [b]", 4, times, wilson(3, 4)), CategoryRow("Food", 4, times)]
    dataset = DatasetRow("p.tsv", "parti_prompts", "ab", 1632, 24, 8, 8, shards=3, shard=(1,), categories=categories)
    console = Console(file=io.StringIO(), width=160)
    print_dataset(dataset, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "8 images of 8 prompts; p.tsv has 1632, of which 24 were taken, shard 1 of 3" in text
    assert "Arts [b]" in text
    assert "75.0 %" in text
    assert "CLIP" not in text
    print_dataset(msgspec.structs.replace(dataset, categories=[]), console)
