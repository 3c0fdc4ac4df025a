"""Load clients on real ranks: every request is answered once, forwards are shared, and a sweep gives a curve."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from harness.metrics.load import RequestRow
from harness.records import load
from harness.records.record import read_status
from harness.resolve.wait_policy import USERS_OWN
from harness.tasks.load.run import REQUESTS_FILE
from harness.tasks.report.rows import read_table
from tests.fixtures.commands import LIMIT_S, command, environment, inspect, processes_about, record_of, run

BRIEF = ["task=load", "load.duration_s=2", "load.warmup_s=0.5", "request.prompts=[rocket,pizza]"]


@pytest.mark.slow
def test_every_request_is_answered_and_requests_share_forwards(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    requested = ["load.clients=6", "load.steps=[2,3]", "load.slo_ms=60000", "logger.table=true"]
    done = run(command(*BRIEF, *requested, f"hydra.run.dir={folder}"))
    assert done.returncode == 0, done.stderr
    found = record_of(folder).load
    assert found is not None
    assert found.outcomes == {"ok": found.sent}
    assert found.sent >= 6
    assert found.goodput_per_s == found.throughput_per_s > 0
    assert found.images_per_evaluation is not None
    assert found.images_per_evaluation > 2
    rows = [msgspec.json.decode(line, type=RequestRow) for line in (folder / REQUESTS_FILE).read_bytes().splitlines()]
    assert {row.steps for row in rows} == {2, 3}
    assert all(row.sent_s < (row.began_s or 0) < (row.ended_s or 0) for row in rows)
    assert f"of {found.sent}: {found.sent} ok" in " ".join(done.stdout.split())
    assert not processes_about(folder)


@pytest.mark.slow
def test_a_sweep_over_rates_is_a_table_a_group_and_a_curve(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    mirrored = ["logger=default", "logger.wandb.mode=offline", "load.slo_ms=2000"]
    arguments = command(*BRIEF, *mirrored, "load.rate=3,6", f"hydra.sweep.dir={folder}")
    done = run([*arguments[:3], "-m", *arguments[3:]])
    assert done.returncode == 0, done.stderr
    assert "ranks were started 1 times and reused 1 times" in done.stdout
    for heading in ("offered/s", "answers/s", "p99 ms", "good/s"):
        assert heading in done.stdout
    jobs = sorted(file.parent for file in folder.rglob("status.json"))
    assert [read_status(job).state for job in jobs] == ["ok", "ok"]
    assert sorted(load(folder)["load.offered_per_s"]) == [3.0, 6.0]
    for job in jobs:
        found, mirror = record_of(job).load, json.loads(inspect(job, "--summary"))["summary"]
        assert found is not None
        assert mirror["throughput_per_s"] == found.throughput_per_s
        assert mirror["outcome_ok"] == found.outcomes["ok"]
        assert found.latency_ms is None or mirror["latency_ms_p99"] == found.latency_ms.p99
    again = run([*arguments[:3], "-m", *arguments[3:]])
    assert "2 jobs were already done" in again.stdout
    rows = read_table(folder).rows
    assert sorted(str(row.values["load.rate"]) for row in rows) == ["3.0", "6.0"]
    assert all(row.load is not None for row in rows)


@pytest.mark.slow
def test_over_http_every_request_is_answered_though_ranks_are_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    requested = ["load.transport=http", "load.rate=3", "load.duration_s=25", "load.kill_every_s=6", "parallel=dp2"]
    done = run(
        command(*BRIEF, *requested, "request.samples_per_prompt=2", "serve.restarts=100", f"hydra.run.dir={folder}")
    )
    assert done.returncode == 0, done.stderr
    found = record_of(folder).load
    assert found is not None
    assert found.chaos is not None
    assert found.chaos.kills == len(found.chaos.killed) >= 1
    assert {kill.rank for kill in found.chaos.killed} <= {0, 1}
    assert [kill.at_s for kill in found.chaos.killed] == sorted(kill.at_s for kill in found.chaos.killed)
    assert found.chaos.leaked == 0
    assert set(found.outcomes) <= {"ok", "failed"}
    assert found.outcomes["ok"] > found.outcomes.get("failed", 0)
    assert sum(found.outcomes.values()) == found.sent > 40
    assert found.strays == 0
    assert found.memory is not None
    assert found.memory.n > 20
    assert not processes_about(folder)


@pytest.mark.slow
def test_a_busy_neighbour_slows_a_server_down_but_does_not_stop_it(tmp_path: Path) -> None:
    """Threads that spin while one of them waits for its core make an answer ten and more times slower."""
    folder = tmp_path / "run"
    overrides = [
        "experiment=neighbour",
        "load.neighbours=[0,1]",
        "load.duration_s=6",
        "task.repeats=2",
        "logger.wandb.mode=disabled",
    ]
    variables = {name: value for name, value in environment().items() if name not in USERS_OWN}
    arguments = [sys.executable, "-m", "harness", "task=load", *overrides, f"hydra.run.dir={folder}"]
    done = subprocess.run(arguments, env=variables, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    record = record_of(folder)
    assert record.load is not None
    assert [row.neighbours for row in record.load.neighbours] == [0, 1]
    assert record.load.neighbours[1].slowdown < 4  # 2.5 on an otherwise idle machine
    assert record.provenance.environment["GOMP_SPINCOUNT"] == "2000"
    assert "median latency beside busy processes" in " ".join(done.stdout.split())
