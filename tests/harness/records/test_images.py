"""images.jsonl: a line per image, what a cut-off run leaves, statistics from the lines, and shards merged into one."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from harness.metrics.summary import summarize
from harness.records import load
from harness.records.images import (
    FILE,
    ImageLog,
    ImageRow,
    RequestTimes,
    grid_rows,
    image_statistics,
    mean_estimate,
    read_images,
)
from harness.records.record import (
    INTERRUPTED,
    DatasetRow,
    Record,
    RunFolder,
    RunFolderError,
    Status,
    fingerprint,
)
from harness.records.shards import merge_complete
from harness.tasks.report.rows import read_table
from tests.fixtures.records import record

CONFIG = {
    "task": {"name": "generate"},
    "launch": {"reuse": 1},
    "request": {"steps": 2},
    "dataset": {"shards": 2, "shard": 0},
}


def row(
    index: int, duration_ms: float = 10.0, categories: tuple[str, ...] = ("a",), folder: Path | None = None
) -> ImageRow:
    """Return the line of an image with made-up numbers; in a folder, its file is there."""
    path = f"samples/{index:06d}.png"
    if folder is not None:
        (folder / "samples").mkdir(exist_ok=True)
        (folder / path).write_bytes(b"png")
    times = RequestTimes(duration_ms, {"denoising": duration_ms - 1}, duration_ms / 4, 0.1, 2, [100.0 + index % 7])
    return ImageRow(index, str(index), categories, "rocket", "", index, 32, 32, path, "ab", duration_ms, times)


def numbers(folder: Path) -> list[int]:
    return [each.index for each in read_images(folder)]


def test_a_line_is_on_disk_at_once_and_reads_back(tmp_path: Path) -> None:
    with ImageLog(tmp_path) as log:
        log.append(row(0, folder=tmp_path))
        assert [*read_images(tmp_path)] == [row(0)]
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_what_a_cut_off_run_leaves_is_repaired(tmp_path: Path) -> None:
    """The last line is incomplete, one image is gone, and one line is there twice."""
    rows = [row(k, folder=tmp_path) for k in (0, 1, 2, 1)]
    lines = b"".join(msgspec.json.encode(each) + b"\n" for each in rows)
    (tmp_path / FILE).write_bytes(lines + msgspec.json.encode(row(3, folder=tmp_path))[:40])
    (tmp_path / "samples/000002.png").unlink()
    with ImageLog(tmp_path) as log:
        assert log.done == {0, 1}
        log.append(row(2, folder=tmp_path))
    assert numbers(tmp_path) == [0, 1, 2]


def test_a_line_of_another_file_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"index": 1}\n')
    with pytest.raises(RunFolderError, match="line 1 is no image of a run"):
        [*read_images(tmp_path)]


def cut_off(path: Path, config: dict[str, object], status: Status = INTERRUPTED) -> None:
    """Leave the folder of a run that has made one image and then ended with a status."""
    folder = RunFolder.claim(path)
    folder.write_config(msgspec.yaml.encode(config).decode())
    with ImageLog(path) as log:
        log.append(row(0, folder=path))
    (path / "logs" / "rank0.error.json").write_text("{}")
    folder.finish(status)
    assert folder._owned is not None
    folder._owned.close()


@pytest.mark.parametrize("again", [False, True])
def test_the_same_configuration_goes_on_and_keeps_the_images(tmp_path: Path, again: bool) -> None:
    cut_off(tmp_path / "run", CONFIG)
    RunFolder.claim(tmp_path / "run", again, CONFIG)
    assert numbers(tmp_path / "run") == [0]
    assert not [*(tmp_path / "run/logs").iterdir()], "an old error would be taken for one of the new ranks"


def test_another_configuration_does_not_go_on(tmp_path: Path) -> None:
    cut_off(tmp_path / "run", CONFIG)
    other = {**CONFIG, "request": {"steps": 3}}
    with pytest.raises(RunFolderError, match="holds images of another configuration"):
        RunFolder.claim(tmp_path / "run", False, other)
    RunFolder.claim(tmp_path / "run", True, other)
    assert not (tmp_path / "run" / FILE).exists(), "a job of a sweep starts again"


def test_a_run_that_ended_well_is_left_alone(tmp_path: Path) -> None:
    cut_off(tmp_path / "run", CONFIG, Status("ok"))
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder.claim(tmp_path / "run", False, CONFIG)


def test_statistics_are_those_of_the_requests() -> None:
    durations = [float(d) for d in np.random.default_rng(0).uniform(5, 15, 40)]
    rows = [row(k, duration, ("a",) if k % 2 else ("b", "c")) for k, duration in enumerate(durations)]
    found, categories = image_statistics(rows)
    assert found.latency_ms == summarize(durations)
    assert found.stage_ms["denoising"].median == pytest.approx(found.latency_ms.median - 1)
    assert found.throughput_per_s == pytest.approx(1e3 * 40 / sum(durations))
    assert (found.nfe, found.peak_memory_mib_max) == (2, 106.0)
    assert [(each.name, each.images) for each in categories] == [("a", 20), ("b", 20), ("c", 20)]
    assert categories[0].duration_ms == summarize(durations[1::2])


def test_a_request_of_several_images_counts_once() -> None:
    one = row(0, 30.0)
    rows = [msgspec.structs.replace(one, duration_ms=10.0), msgspec.structs.replace(row(1), request=None)]
    found, _ = image_statistics(rows)
    assert (found.latency_ms.n, found.latency_ms.median) == (1, 30.0)
    assert found.throughput_per_s == pytest.approx(2e3 / 30)


@pytest.mark.parametrize("count", [1, 5, 64, 65, 1000])
def test_a_grid_is_an_even_sample(count: int) -> None:
    chosen = [each.index for each in grid_rows((row(k) for k in range(count)), count)]
    assert len(chosen) == min(count, 64)
    assert chosen[0] == 0
    assert max(np.diff([*chosen, count])) <= -(-count // 64)


def test_a_mean_has_the_interval_of_its_values() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400).tolist()
    found = mean_estimate(values)
    assert found.ci95 is not None
    assert found.value == pytest.approx(np.mean(values))
    assert found.ci95[1] - found.ci95[0] == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.15)
    assert mean_estimate([1.0, 2.0]).ci95 is None


def shard(folder: Path, number: int, state: str = "ok") -> tuple[Path, Record]:
    """Leave the folder of one of two shards with ten images."""
    config = {**CONFIG, "dataset": {"shards": 2, "shard": number}}
    rows = [row(k, 10.0 + k, folder=folder) for k in range(number, 20, 2)]
    with ImageLog(folder) as log:
        for each in rows:
            log.append(each)
    dataset = DatasetRow("p.txt", "text", "ab", 20, 20, 10, 10, shards=2, shard=(number,))
    made = msgspec.structs.replace(
        record(), config=config, fingerprint=fingerprint(config), repeats=[], dataset=dataset,
        summary=image_statistics(rows)[0],
    )  # fmt: skip
    (folder / "record.json").write_bytes(msgspec.json.encode(made))
    (folder / "status.json").write_bytes(msgspec.json.encode(Status(state)))
    return folder, made


@pytest.fixture
def two_shards(tmp_path: Path) -> dict[Path, Record]:
    for number in range(2):
        (tmp_path / f"job{number}").mkdir()
    return dict(shard(tmp_path / f"job{number}", number) for number in (1, 0))


def test_shards_are_one_record_over_all_images(two_shards: dict[Path, Record]) -> None:
    (merged,) = merge_complete(two_shards)
    whole = image_statistics([row(k, 10.0 + k) for k in (*range(0, 20, 2), *range(1, 20, 2))])[0]
    assert merged.record.summary == whole
    assert merged.record.dataset is not None
    assert (merged.record.dataset.images, merged.record.dataset.shard) == (20, (0, 1))
    assert [folder.name for folder in merged.folders] == ["job0", "job1"]


def test_a_table_has_one_row_for_all_shards(two_shards: dict[Path, Record], tmp_path: Path) -> None:
    table = load(tmp_path)
    assert len(table) == 1
    assert table["dataset.images"][0] == 20
    assert table["summary.latency_ms.n"][0] == 20
    assert table["summary.latency_ms.ci95_low"][0] <= table["summary.latency_ms.median"][0]


def test_shards_stay_apart_until_all_have_ended_well(two_shards: dict[Path, Record], tmp_path: Path) -> None:
    shard(tmp_path / "job1", 1, "failed")
    assert len(load(tmp_path)) == 2
    assert merge_complete({folder: each for folder, each in two_shards.items() if folder.name == "job0"}) == []


def test_a_report_has_one_row_for_all_shards(two_shards: dict[Path, Record], tmp_path: Path) -> None:
    table = read_table(tmp_path)
    (row,) = table.rows
    assert (row.images, row.latency.n if row.latency else 0) == (20, 20)
    assert [category.name for category in row.categories] == ["a"]
    shard(tmp_path / "job1", 1, "failed")
    assert [each.images for each in read_table(tmp_path).rows] == [10, 10]
