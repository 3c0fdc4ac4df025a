"""A data set image by image: what is on disk and when, where a cut-off command goes on, and the same images anyway."""

import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from harness.client.generator import DiffusionGenerator, Generation
from harness.config.schema import RequestConfig
from harness.datasets.prompts import DatasetPrompt
from harness.engines.pool import EnginePool
from harness.records import load
from harness.records.images import ImageRow, read_images
from harness.records.record import Record, RunFolderError, Status, read_record, read_status
from harness.resolve.compose import compose_run
from harness.tasks import generate
from harness.tasks.common.stream import prompt_groups
from tests.fixtures.plugins import no_plugins_left
from tests.fixtures.records import assert_valid

NAMES = ("red apple", "rocket", "pizza", "strawberry", "bicycle", "cat", "dog")
TINY = (
    "request.steps=1",
    "request.height=32",
    "request.width=32",
    "launch.mode=inprocess",
    "launch.threads_per_rank=1",
    "logger.wandb.mode=disabled",
    "logger.table=false",
    "attention=math",
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    own = {2: ', "seed": 40', 4: ', "size": "64x32"', 5: ', "negative": "blurry"'}
    lines = [f'{{"prompt": "{name}", "category": "{"ab"[k % 2]}"{own.get(k, "")}}}' for k, name in enumerate(NAMES)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def pool() -> Iterator[EnginePool]:
    with EnginePool() as made:
        yield made


def run(pool: EnginePool, folder: Path, prompts: Path, *overrides: str, console: Console | None = None) -> Status:
    resolved = compose_run([*TINY, f"dataset.file={prompts}", f"hydra.run.dir={folder}", *overrides])
    return generate.execute(resolved, console or Console(quiet=True), pool.engine)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def hashes(folder: Path) -> dict[str, str]:
    return {row.prompt: row.sha256 for row in read_images(folder)}


def record_of(folder: Path) -> Record:
    found = read_record(folder)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def whole(pool: EnginePool, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(pool, folder, prompts) == Status("ok")
    return folder


@pytest.mark.parametrize("task", ["generate", "bench"])
def test_nothing_is_logged_to_wandb_while_a_request_is_timed(
    pool: EnginePool, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """A data set is logged between its requests, and a bench after its last one, when its ranks are back."""
    events: list[str] = []
    generate_once, stop = DiffusionGenerator.generate, DiffusionGenerator.stop

    def timed(*arguments: Any, **options: Any) -> Generation:
        events.append("begin")
        done = generate_once(*arguments, **options)
        events.append("end")
        return done

    def stopped(generator: DiffusionGenerator) -> None:
        stop(generator)
        events.append("stop")

    def open_run(*arguments: object, **options: object) -> MagicMock:
        events.append("wandb")
        made = MagicMock(id="a")
        for name in ("log", "log_artifact", "define_metric", "finish"):
            getattr(made, name).side_effect = lambda *arguments, **options: events.append("wandb")
        return made

    monkeypatch.setattr(DiffusionGenerator, "generate", timed)
    monkeypatch.setattr(DiffusionGenerator, "stop", stopped)
    monkeypatch.setattr("harness.loggers.wandb.open_run", open_run)
    monkeypatch.setattr("harness.loggers.images.open_run", open_run)
    monkeypatch.setattr("harness.loggers.images.BATCH", 2)
    own = [f"dataset.file={prompts}"] if task == "generate" else ["task.warmup=0", "task.fidelity=false"]
    measured = [f"task={task}", "logger.wandb.mode=offline", *own, f"hydra.run.dir={tmp_path / 'run'}"]
    assert generate.execute(compose_run([*TINY, *measured]), Console(quiet=True), pool.engine) == Status("ok")
    assert [*pairwise(events)].count(("begin", "end")) == events.count("begin") >= 5
    assert events[-1] == "wandb"
    during = events[: events.index("stop")]
    assert ("wandb" in during) is (task == "generate")


def test_every_prompt_has_its_image_its_seed_and_its_line(whole: Path) -> None:
    rows = [*read_images(whole)]
    assert [row.prompt for row in rows] == [*NAMES]
    assert [row.seed for row in rows] == [0, 1, 40, 3, 4, 5, 6], "prompt k has seed + k, unless the file has a seed"
    assert [(row.width, row.height) for row in rows] == [(32, 32)] * 4 + [(64, 32)] + [(32, 32)] * 2
    assert [row.negative_prompt for row in rows] == [""] * 5 + ["blurry", ""]
    with Image.open(whole / rows[4].path) as image:
        assert image.size == (64, 32)
        assert image.info["prompt"] == "bicycle"


def test_the_record_is_that_of_all_images(whole: Path) -> None:
    record = record_of(whole)
    assert record.dataset is not None
    assert (record.dataset.images, record.dataset.prompts, record.dataset.resumed) == (7, 7, 0)
    assert [(row.name, row.images) for row in record.dataset.categories] == [("a", 4), ("b", 3)]
    assert record.statistics.latency_ms.n == 7
    assert record.repeats == []
    assert {sample.path for sample in record.samples} == {row.path for row in read_images(whole)}
    assert (whole / "grid.png").is_file()
    assert_valid(whole)
    images = load(whole, long="images")
    assert list(images["sha256"]) == [row.sha256 for row in read_images(whole)]
    assert list(images["categories"].iloc[0]) == list(next(read_images(whole)).categories)
    assert load(whole, long="repeats")["total_duration_ms"].median() == record.statistics.latency_ms.median


def test_an_image_is_scored_in_its_line_as_in_its_category(whole: Path) -> None:
    record, rows = record_of(whole), [*read_images(whole)]
    assert record.quality is not None
    assert record.dataset is not None
    scored = [row for row in rows if row.top1 is not None]
    assert record.quality.scored == len(scored) > 0
    assert record.quality.top1.hits == sum(row.top1 is True for row in scored)
    assert sum(row.top1.n for row in record.dataset.categories if row.top1 is not None) == len(scored)


@pytest.mark.parametrize("number", [1, 2, 4, 5])
def test_an_image_equals_the_one_made_alone(pool: EnginePool, whole: Path, tmp_path: Path, number: int) -> None:
    row = [*read_images(whole)][number]
    alone = compose_run(
        [
            *TINY,
            f"request.prompt={row.prompt}",
            f"request.seed={row.seed}",
            f"request.height={row.height}",
            f"request.width={row.width}",
            f"request.negative_prompt='{row.negative_prompt}'",
            f"hydra.run.dir={tmp_path / 'alone'}",
        ]
    )
    assert generate.execute(alone, Console(quiet=True), pool.engine) == Status("ok")
    assert record_of(tmp_path / "alone").samples[0].sha256 == row.sha256


def test_shards_and_samples_change_no_image(pool: EnginePool, whole: Path, prompts: Path, tmp_path: Path) -> None:
    for shard in (0, 1):
        folder = tmp_path / str(shard)
        assert run(pool, folder, prompts, "dataset.shards=2", f"dataset.shard={shard}") == Status("ok")
    assert run(pool, tmp_path / "few", prompts, "dataset.per_category=1", "dataset.seed=3") == Status("ok")
    assert hashes(tmp_path / "0") | hashes(tmp_path / "1") == hashes(whole)
    assert hashes(tmp_path / "few").items() < hashes(whole).items()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the prompts of every request; the fourth one is cut off."""
    found: list[list[str]] = []
    original = DiffusionGenerator.generate

    def counted(self: DiffusionGenerator, *args: object, **options: object) -> Generation:
        named = options["prompts"]
        assert isinstance(named, list)
        found.append(named)
        if len(found) == 4:
            raise KeyboardInterrupt
        return original(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(DiffusionGenerator, "generate", counted)
    return found


def test_a_cut_off_command_goes_on_and_generates_nothing_twice(
    pool: EnginePool, whole: Path, prompts: Path, tmp_path: Path, calls: list[list[str]]
) -> None:
    folder = tmp_path / "run"
    said = Console(file=io.StringIO(), width=500)
    assert run(pool, folder, prompts, console=said).state == "cancelled"
    assert f"goes on after its images with hydra.run.dir={folder}" in text_of(said)
    assert [row.prompt for row in read_images(folder)] == [*NAMES[:3]], "each image is on disk before the next request"
    (folder / "samples/000001.png").unlink()
    with (folder / "images.jsonl").open("ab") as file:
        file.write(b'{"index": 3, "id"')
    assert run(pool, folder, prompts, console=said) == Status("ok")
    assert f"going on after 2 of 7 images that {folder} has" in text_of(said)
    assert calls[4:] == [["rocket"], *([name] for name in NAMES[3:])]
    assert hashes(folder) == hashes(whole)
    assert len([*read_images(folder)]) == len(NAMES)
    record = record_of(folder)
    assert record.dataset is not None
    assert (record.dataset.images, record.dataset.resumed, record.statistics.latency_ms.n) == (7, 2, 7)
    with pytest.raises(RunFolderError, match="already holds a run"):
        run(pool, folder, prompts)


def test_another_configuration_leaves_a_cut_off_run_alone(
    pool: EnginePool, prompts: Path, tmp_path: Path, calls: list[list[str]]
) -> None:
    folder = tmp_path / "run"
    run(pool, folder, prompts)
    with pytest.raises(RunFolderError, match="holds images of another configuration"):
        run(pool, folder, prompts, "request.guidance=1")
    assert read_status(folder).state == "cancelled"
    assert len([*read_images(folder)]) == 3


def test_several_images_of_a_prompt_have_seeds_of_their_own(pool: EnginePool, prompts: Path, tmp_path: Path) -> None:
    options = ("request.samples_per_prompt=2", "request.batch_size=4", "dataset.limit=4")
    assert run(pool, tmp_path / "run", prompts, *options) == Status("ok")
    rows: list[ImageRow] = [*read_images(tmp_path / "run")]
    assert [row.seed for row in rows] == [0, 1, 2, 3, 40, 41, 6, 7]
    assert [row.request is not None for row in rows] == [True, False, False, False] * 2
    assert len({row.sha256 for row in rows}) == 8


def test_a_metric_of_a_plugin_is_that_of_all_images(pool: EnginePool, prompts: Path, tmp_path: Path) -> None:
    code = tmp_path / "brightness.py"
    code.write_text(
        "from harness.plugins import register_metric\n"
        "def register():\n"
        "    register_metric('brightness', lambda images, prompts: sum(x.mean() for x in images) / len(images))\n"
    )
    folder = tmp_path / "run"
    with no_plugins_left():
        own = (f"plugins=[{code}]", "quality.metrics=[brightness]", "dataset.limit=2")
        assert run(pool, folder, prompts, *own) == Status("ok")
    pixels = [np.asarray(Image.open(folder / row.path)) for row in read_images(folder)]
    assert record_of(folder).metrics == {"brightness": pytest.approx(np.mean(pixels))}


def test_from_python_a_data_set_is_not_taken_for_its_first_prompt(prompts: Path) -> None:
    with DiffusionGenerator.from_config(*TINY, f"dataset.file={prompts}") as generator:
        with pytest.raises(ValueError, match="generated by the command"):
            generator.generate()
        answer = generator.generate(prompts=["rocket", "cat"], seeds=[40, 7])
    assert [sample.seed for sample in answer.result.samples] == [40, 7]


def groups(size: int, *prompts: DatasetPrompt, samples: int = 1) -> list[list[int]]:
    request = RequestConfig(height=32, width=32, negative_prompt="", samples_per_prompt=samples)
    return [[prompt.index for prompt in group.prompts] for group in prompt_groups(prompts, request, size)]


def test_prompts_of_one_request_have_one_size_and_negative_prompt() -> None:
    plain = [DatasetPrompt(k, "a", str(k), k) for k in range(6)]
    assert groups(4, *plain) == [[0, 1, 2, 3], [4, 5]]
    assert groups(4, *plain, samples=2) == [[0, 1], [2, 3], [4, 5]]
    assert groups(4, *plain, samples=9) == [[k] for k in range(6)]
    assert groups(1, *plain[:2]) == [[0], [1]]
    own = [plain[0], replace_prompt(plain[1], height=64), replace_prompt(plain[2], negative_prompt="b"), plain[3]]
    assert groups(4, *own) == [[0], [1], [2], [3]]
    assert groups(4, replace_prompt(plain[0], height=32), *plain[1:3]) == [[0, 1, 2]]


def replace_prompt(
    prompt: DatasetPrompt, height: int | None = None, negative_prompt: str | None = None
) -> DatasetPrompt:
    return DatasetPrompt(
        prompt.index, prompt.prompt, prompt.id, prompt.line, height=height, negative_prompt=negative_prompt
    )
