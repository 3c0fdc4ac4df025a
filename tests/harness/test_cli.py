"""What a command line leaves: nothing if it is refused, a row for each job of a sweep, and the value of each job."""

import math
import pickle
import sys
from pathlib import Path

import msgspec
import pandas
import pytest

from harness.cli import HydraSession, dispatch, objective_value
from harness.metrics.difference import Difference
from harness.metrics.fidelity import Fidelity
from harness.records import load
from harness.records.job import JobResult, read_jobs
from harness.records.record import RunFolder, Status, read_status
from harness.resolve.folder_name import folder_name
from harness.resolve.search_path import SearchPath
from tests.fixtures.records import record

ROW = Fidelity("fp_equivalent", [], Difference(0.01, 0.1), Difference(0.02, 0.2), 0.1, 0.1, "within_floor", "key")


def exit_code(folder: Path, bound: float | None, fidelity: Fidelity | None, state: str = "ok") -> float:
    run = RunFolder.claim(folder)
    row = record()
    config = row.config | {"task": {"max_pixel_error": bound}}
    run.write_record(msgspec.structs.replace(row, config=config, fidelity=fidelity))
    run.finish(Status(state))
    return objective_value(JobResult(folder, Status(state)))


@pytest.mark.parametrize(
    ("bound", "fidelity", "state", "bounded"),
    [
        (None, None, "ok", False),
        (0.03, ROW, "ok", False),
        (0.01, ROW, "ok", True),
        (0.03, None, "ok", True),
        (None, ROW, "failed", True),
    ],
)
def test_it_is_the_latency_at_a_bound(
    tmp_path: Path, bound: float | None, fidelity: Fidelity | None, state: str, bounded: bool
) -> None:
    expected = math.inf if bounded else record().summary.latency_ms.median
    assert exit_code(tmp_path, bound, fidelity, state) == expected


def test_a_job_without_a_record_is_worth_nothing(tmp_path: Path) -> None:
    assert objective_value(JobResult(tmp_path, Status("ok"))) == math.inf


def test_a_job_is_not_worth_what_another_run_in_its_folder_is(tmp_path: Path) -> None:
    run = RunFolder.claim(tmp_path)
    run.write_record(record())
    assert objective_value(JobResult(tmp_path, Status("ok"), owns_folder=False)) == math.inf


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["triptych"])
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["request.height=65"],
        ["no.such.key=1"],
        ["request.prompt=abc("],
        ["request.steps=many"],
        ["hydra.run.dir=out(", "request.height=65"],
        ["-m", "request.steps=many,2"],
        ["-m", "hydra.sweep.dir=out/a/b", "request.steps=many,2"],
        ["-m", "request.stepz=1,2"],
        ["-m", "task=serve"],
        ["--config-dir", ".", "request.height=65"],
        ["task=compare"],
        ["task=report"],
    ],
    ids=" ".join,
)
def test_a_refused_command_line_is_one_line_and_leaves_no_folder(
    place: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatch(arguments) in (1, 2)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("triptych: ")
    assert said.err.count("\n") == 1
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("flags", [[], ["--config-dir", "."]], ids=["plain", "flags"])
def test_a_refused_command_line_leaves_its_status_in_the_folder_that_it_names(place: Path, flags: list[str]) -> None:
    assert dispatch([*flags, "hydra.run.dir=out/a/b", "request.steps=0"]) in (1, 2)
    assert read_status(place / "out/a/b") == Status("failed", "request.steps=0; give 1 to 10000")


def test_a_sweep_keeps_what_was_in_its_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "sweep").mkdir()
    (place / "sweep" / "notes.txt").write_text("mine")
    assert dispatch(["-m", "hydra.sweep.dir=sweep", "request.steps=many,2"]) == 2
    assert (place / "sweep" / "notes.txt").read_text() == "mine"


def sweep(place: Path, *axes: str) -> int:
    return dispatch(["-m", "hydra.sweep.dir=sweep", "logger=json", *axes])


def test_a_job_whose_folder_holds_another_run_is_a_failed_row(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of one job holds another configuration's run, as after a change of a file of conf/."""
    run = RunFolder.claim(place / "sweep" / folder_name(["logger=json", "request.steps=3"]))
    run.write_record(record(latency_ms=1234.5))
    run.finish(Status("ok"))
    assert sweep(place, "request.steps=3,0") == 1
    said = capsys.readouterr()
    assert "1234.5" not in said.out
    assert said.out.count("failed") == 2
    assert "already holds a run" in said.out
    assert read_status(run.path) == Status("ok")
    table = load(place / "sweep").set_index("state")
    assert set(table["sweep"].dropna()) == {f"{place.name}-sweep"}
    assert table["job"]["failed"] == 1
    assert pandas.isna(table["job"]["ok"])  # which is another run's


def test_a_refused_job_leaves_nothing_of_the_attempt_before(place: Path) -> None:
    """A failed run's numbers, images and configuration go when its job runs again and is refused."""
    run = RunFolder.claim(place / "sweep" / folder_name(["logger=json", "request.steps=0"]))
    run.write_record(record())
    run.write_config("request: {steps: 2}")
    RunFolder.claim(run.path / "a").finish(Status("ok"))
    (run.path / "samples").mkdir()
    for name in ("grid.png", "samples/0000.png"):
        (run.path / name).write_bytes(b"an image")
    run.finish(Status("failed", "broken"))
    run._owned.close()  # type: ignore[union-attr]
    assert sweep(place, "request.steps=0,-1") == 1
    assert {file.name for file in run.path.iterdir()} == {".owner", "logs", "status.json", "job.json"}
    table = load(place / "sweep")
    assert list(table["state"]) == ["failed", "failed"]
    assert sorted(table["job"]) == [0, 1]
    assert sorted(table["overrides"]) == [["logger=json", "request.steps=-1"], ["logger=json", "request.steps=0"]]
    assert table["started_at"].notna().all()
    assert "summary.latency_ms.median" not in table


def test_a_job_in_a_process_of_its_own_leaves_its_outcome_for_the_sweep(tmp_path: Path) -> None:
    """As submitit does it: the session travels with the job, and what else is in the sweep's folder is no job of it."""
    session = HydraSession(SearchPath(), tmp_path / "outcomes")
    jobs = [
        JobResult(tmp_path / "a", Status("ok"), True),
        JobResult(tmp_path / "b", Status("failed", "x"), False, False),
    ]
    for number, job in reversed([*enumerate(jobs)]):
        pickle.loads(pickle.dumps(session)).add(job, number)
    session.add(jobs[0], 0)
    assert read_jobs(tmp_path / "outcomes") == jobs
