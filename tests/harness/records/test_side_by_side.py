"""Jobs of a sweep that run at the same time on one machine say so; others do not."""

import platform
from pathlib import Path

import pytest
from rich.console import Console

from harness.loggers.table import print_sweep
from harness.records.job import JobResult
from harness.records.record import RunFolder, Status, lock_file, read_record
from harness.records.side_by_side import RUNNING, note_beside, running_job
from tests.fixtures.records import record


def test_jobs_at_the_same_time_see_each_other(tmp_path: Path) -> None:
    with running_job(tmp_path, "a") as beside_a:
        with running_job(tmp_path, "b") as beside_b:
            assert (beside_a(), beside_b()) == (["b"], ["a"])
        assert beside_a() == ["b"]  # it has ended, and ran meanwhile


def test_jobs_one_after_another_do_not(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with running_job(tmp_path, name) as beside:
            assert beside() == []


def test_a_job_on_another_machine_is_not_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_job(tmp_path, "a") as beside:
        monkeypatch.setattr(platform, "node", lambda: "elsewhere")
        with running_job(tmp_path, "b") as beside_b:
            assert (beside(), beside_b()) == ([], [])


def test_a_refused_job_and_a_killed_one_are_not_beside(tmp_path: Path) -> None:
    with running_job(tmp_path, "a") as beside:
        with pytest.raises(ValueError, match="refused"), running_job(tmp_path, "b"):
            raise ValueError("refused")
        assert beside() == []
        (own,) = (tmp_path / RUNNING).glob("*.json")
        killed = own.with_name("killed.json")
        killed.write_bytes(own.read_bytes().replace(b'"a"', b'"c"'))
        assert beside() == []
        with lock_file(killed.with_suffix(".lock")):  # as while it lived
            assert beside() == ["c"]


def test_the_row_says_so(tmp_path: Path) -> None:
    jobs = []
    for name, others in (("a", ["b"]), ("b", [])):
        folder = RunFolder.claim(tmp_path / name)
        folder.write_record(record())
        jobs.append(JobResult(folder.path, Status("ok")))
        note_beside(jobs[-1], others)
    rows = [read_record(job.folder) for job in jobs]
    assert [row.beside for row in rows if row is not None] == [["b"], []]
    assert "1 other job of the sweep ran at the same time on this machine (b)" in rows[0].notes[-1]  # type: ignore
    console = Console(record=True, width=200)
    print_sweep(jobs, console)
    assert "beside" in console.export_text(clear=False)
    print_sweep(jobs[1:], quiet := Console(record=True, width=200))
    assert "beside" not in quiet.export_text()
