"""A run's folder has one owner, its files are complete at any time, and its record comes back as a table."""

import errno
import json
import os
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from harness.metrics.intervals import IntervalEstimate, wilson
from harness.metrics.quality import Quality
from harness.records import load
from harness.records.media import pixel_hash, save_png, to_uint8
from harness.records.record import (
    INTERRUPTED,
    SCHEMA,
    Record,
    RunFolder,
    RunFolderError,
    Status,
    fingerprint,
    is_done,
    read_record,
    read_status,
    write_atomically,
)
from harness.resolve.compose import compose_run, to_dict
from tests.fixtures.records import record


def test_exactly_one_of_many_threads_claims_a_folder(tmp_path: Path) -> None:
    for attempt in range(10):
        folder, barrier = tmp_path / str(attempt), threading.Barrier(4)
        outcomes: list[str] = []

        def claim(folder: Path = folder, barrier: threading.Barrier = barrier, outcomes: list[str] = outcomes) -> None:
            barrier.wait()
            try:
                RunFolder.claim(folder)
                outcomes.append("claimed")
            except RunFolderError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=claim) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert len(outcomes) == 4
        assert outcomes.count("claimed") == 1
        assert sum("already holds a run" in outcome for outcome in outcomes) == 3


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_disk_is_one_line_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    folder, row = RunFolder.claim(tmp_path / "run"), record()
    before = read_status(folder.path)
    monkeypatch.setattr(Path if call == "replace" else os, call, full)
    for write in (
        lambda: folder.write_record(row),
        lambda: folder.write_config("a: b"),
        lambda: folder.finish(Status("ok")),
    ):
        with pytest.raises(RunFolderError, match=f"cannot be written .{os.strerror(number)}.*hydra.run.dir") as raised:
            write()
        assert str(raised.value).isprintable()
    with pytest.raises(RunFolderError, match="cannot be written"):
        RunFolder.claim(tmp_path / "other")
    monkeypatch.undo()
    assert {file.name for file in (tmp_path / "other").iterdir()} == {".owner", "logs"}
    assert {file.name for file in folder.path.iterdir()} == {".owner", "logs", "status.json"}
    assert read_status(folder.path) == before


def test_a_record_without_a_status_holds_its_folder(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_record(record())
    for again in (False, True):
        with pytest.raises(RunFolderError, match="already holds a run"):
            RunFolder.claim(tmp_path, again)
    assert read_record(tmp_path) == record()


def test_a_run_that_scored_other_images_is_not_done(tmp_path: Path) -> None:
    config = to_dict(compose_run([]).config)
    folder = RunFolder.claim(tmp_path)
    folder.write_record(msgspec.structs.replace(record(), config=config, fingerprint=fingerprint(config)))
    folder.finish(Status("ok"))
    assert is_done(tmp_path, config)
    assert not is_done(tmp_path, config | {"quality": config["quality"] | {"gallery": "elsewhere"}})


def test_an_occupied_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    RunFolder.claim(tmp_path).finish(Status("ok"))
    with pytest.raises(RunFolderError, match=r"already holds a run.*hydra\.run\.dir"):
        RunFolder.claim(tmp_path)
    assert read_status(tmp_path) == Status("ok")


@pytest.mark.parametrize("state", ["failed", "cancelled", "oom"])
def test_the_folder_of_a_run_that_did_not_end_well_is_taken_over(tmp_path: Path, state: str) -> None:
    first = RunFolder.claim(tmp_path)
    first.write_record(record())
    (tmp_path / "logs" / "rank0.error.json").write_text("{}")
    first.finish(Status(state, "no"))
    with pytest.raises(RunFolderError, match="already holds a run"):  # its process is alive
        RunFolder.claim(tmp_path, again=True)
    assert read_status(tmp_path) == Status(state, "no")
    del first
    RunFolder.claim(tmp_path, again=True)
    assert read_status(tmp_path) == INTERRUPTED
    assert read_record(tmp_path) is None
    assert not list((tmp_path / "logs").glob("*.json"))


def test_a_run_that_ended_well_is_never_taken_over(tmp_path: Path) -> None:
    RunFolder.claim(tmp_path).finish(Status("ok"))
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder.claim(tmp_path, again=True)
    assert read_status(tmp_path) == Status("ok")


def test_a_row_is_done_once_its_status_is_there(tmp_path: Path) -> None:
    declared = to_dict(compose_run(["request.prompt=rocket"]).config)
    folder = RunFolder.claim(tmp_path)
    folder.write_record(msgspec.structs.replace(record(), fingerprint=fingerprint(declared)))
    assert not is_done(tmp_path, declared)  # truncated before its end
    folder.finish(Status("failed", "broken: ..."))
    assert is_done(tmp_path, declared)
    assert not is_done(tmp_path, declared | {"request": {}})


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        RunFolder.claim(tmp_path / "file" / "run")


def test_a_run_that_is_interrupted_says_so(tmp_path: Path) -> None:
    RunFolder.claim(tmp_path)
    assert read_status(tmp_path) == Status("failed", "the run was cut off before it ended")
    assert read_record(tmp_path) is None


def test_a_record_from_before_a_key_was_added_is_read(tmp_path: Path) -> None:
    RunFolder.claim(tmp_path).write_record(record())
    content = json.loads((tmp_path / "record.json").read_text())
    assert content.pop("loaded") == []
    (tmp_path / "record.json").write_text(json.dumps(content))
    assert read_record(tmp_path) == record()


def test_a_record_from_before_intervals_had_a_coverage_is_read(tmp_path: Path) -> None:
    RunFolder.claim(tmp_path).write_record(record())
    content = json.loads((tmp_path / "record.json").read_text())
    for name in ("started", "ended", "command", "sources_sha256", "cpu"):
        content["provenance"].pop(name)
    for repeat in content["repeats"]:
        repeat.pop("machine")
    content["summary"].pop("first_step_ms")
    latency = content["summary"]["latency_ms"]
    latency.pop("range")
    latency.pop("coverage")
    latency["ci95"] = [9.0, 11.0]
    (tmp_path / "record.json").write_text(json.dumps(content))
    found = read_record(tmp_path)
    assert found is not None
    assert found.statistics.latency_ms.spread == (9.0, 11.0)
    assert (found.provenance.cpu, found.repeats[0].machine, found.statistics.first_step_ms) == (None, None, None)


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path, done = tmp_path / "record.json", threading.Event()
    contents = [bytes([letter]) * 400_000 for letter in b"ab"]
    path.write_bytes(contents[0])

    def write() -> None:
        for turn in range(300):
            write_atomically(path, contents[turn % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(path.read_bytes())
    writer.join(timeout=30)
    assert seen <= set(contents)
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(b"old")

    def full(self: Path, target: Path) -> Path:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_record_comes_back_as_written(tmp_path: Path) -> None:
    folder = RunFolder.claim(tmp_path)
    folder.write_record(record())
    assert read_record(tmp_path) == record()


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', ""])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(RunFolderError, match="not a record of schema"):
        read_record(tmp_path)


def test_a_record_of_another_schema_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_record(record(schema=SCHEMA + 1))
    with pytest.raises(RunFolderError, match=f"schema {SCHEMA + 1}; this version reads {SCHEMA}"):
        read_record(tmp_path)


def test_the_table_has_every_run_failed_ones_too(tmp_path: Path) -> None:
    for name, latency in (("a", 10.0), ("deep/b", 20.0)):
        folder = RunFolder.claim(tmp_path / name)
        folder.write_record(record(latency))
        folder.finish(Status("ok"))
    RunFolder.claim(tmp_path / "c").finish(Status("failed", "rank 1 died"))
    RunFolder.claim(tmp_path / "d")
    table = load(tmp_path).set_index("folder")
    assert list(table.index) == [str(tmp_path / name) for name in ("a", "c", "d", "deep/b")]
    assert list(table["state"]) == ["ok", "failed", "failed", "ok"]
    assert table["error"][str(tmp_path / "c")] == "rank 1 died"
    assert table["summary.latency_ms.median"][str(tmp_path / "deep/b")] == 20.0
    assert table["config.request.steps"][str(tmp_path / "a")] == 2
    assert table["summary.latency_ms.median"].isna().sum() == 2
    assert len(table["repeats"][str(tmp_path / "a")]) == 2


def test_an_empty_tree_is_an_empty_table(tmp_path: Path) -> None:
    assert len(load(tmp_path)) == 0


def test_the_fingerprint_is_of_the_request_not_of_the_logger() -> None:
    def of(*overrides: str) -> str:
        return fingerprint(to_dict(compose_run(overrides).config))

    plain = of()
    assert plain == of("logger=json", "logger.wandb.project=other")
    assert plain == of("hydra.run.dir=elsewhere", "launch.start_timeout_s=7")
    different = ["request.seed=1", "request.prompt=rocket", "request.steps=3", "parallel=dp2", "attention=math"]
    assert len({plain, *(of(override) for override in different)}) == 1 + len(different)


def test_a_png_says_what_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).uniform(-0.1, 1.1, size=(3, 8, 16)).astype(np.float32)
    written_image = to_uint8(pixels)
    assert written_image.shape == (8, 16, 3)
    assert written_image.min() == 0
    assert written_image.max() == 255
    assert to_uint8(np.full((3, 1, 1), 0.5 / 255 + 1e-6, np.float32)).max() == 1  # rounded, not truncated
    text = {"prompt": "naïve 日本 🍎", "seed": "7", "fingerprint": "0123"}
    save_png(tmp_path / "a.png", written_image, text)
    with Image.open(tmp_path / "a.png") as image:
        assert {key: image.info[key] for key in text} == text
        assert pixel_hash(np.asarray(image)) == pixel_hash(written_image)
    assert pixel_hash(written_image) != pixel_hash(written_image[::-1])


def test_a_score_is_columns_of_the_table_and_an_older_record_has_none(tmp_path: Path) -> None:
    share, gap = wilson(9, 10), IntervalEstimate(0.25, (0.2, 0.3), 10)
    quality = Quality("ab", 10, 2, 10, 0.1, share, share, None, gap, gap, None)
    scored = msgspec.structs.replace(record(), quality=quality)
    for name, each in (("a", scored), ("b", record())):
        folder = RunFolder.claim(tmp_path / name)
        folder.write_record(each)
        folder.finish(Status("ok"))
    older = json.loads((tmp_path / "b" / "record.json").read_text())
    assert older.pop("quality") is None
    (tmp_path / "b" / "record.json").write_text(json.dumps(older))
    assert read_record(tmp_path / "a") == scored
    assert read_record(tmp_path / "b") == record()
    table = load(tmp_path)
    assert list(table["quality.top1.value"].fillna(-1)) == [0.9, -1]
    assert list(table[["quality.distance.ci95_low", "quality.distance.ci95_high"]].iloc[0]) == [0.2, 0.3]
    assert "quality" not in table


def test_the_record_on_disk_is_plain_json(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_record(record())
    plain = json.loads((tmp_path / "record.json").read_text())
    assert plain["schema"] == SCHEMA
    assert set(plain) == set(Record.__struct_fields__)
    assert msgspec.convert(plain, Record) == record()
