"""What a user sees outside a checkout: an installed copy, a sweep on real ranks, and the overhead of the harness."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.records.record import load, read_status
from tests.fixtures.commands import LIMIT_S, QUICK, environment, record_of, run

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_an_installed_copy_works_from_any_folder(tmp_path: Path) -> None:
    site, away = tmp_path / "site", tmp_path / "away"
    away.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(ROOT)]
    subprocess.run(install, check=True, timeout=300, capture_output=True)
    command = [sys.executable, "-m", "harness", *QUICK, "request.prompt=rocket"]
    done = subprocess.run(
        command,
        cwd=away,
        env=environment() | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    (status,) = away.glob("runs/*/*/status.json")
    assert read_status(status.parent).state == "ok"
    assert record_of(status.parent).provenance.git is None  # the copy, not this checkout
    assert len(list((site / "harness" / "tasks" / "serve").glob("page.*"))) == 3
    assert list(site.glob("*.dist-info/licenses/LICENSE"))


@pytest.mark.slow
def test_a_sweep_on_real_ranks(tmp_path: Path) -> None:
    overrides = ["scheduler/solver=euler,heun", "request.steps=4,8", "request.prompt=rocket", "parallel=dp2"]
    done = run(
        [sys.executable, "-m", "harness", "-m", *QUICK[:1], *QUICK[2:], *overrides, f"hydra.sweep.dir={tmp_path}"]
    )
    assert done.returncode == 0, done.stderr
    table = load(tmp_path)
    assert list(table["state"]) == ["ok"] * 4
    assert sorted(table["summary.nfe"]) == [4, 7, 8, 15]


@pytest.mark.slow
@pytest.mark.skipif(os.cpu_count() == 1, reason="the client and the rank share one core")
def test_the_harness_costs_little_beside_the_networks(tmp_path: Path) -> None:
    """At 20 steps the median share outside the networks is a few percent; the bound leaves room for a busy machine."""
    command = [
        sys.executable,
        "-m",
        "harness",
        "task=bench",
        "request.prompt=rocket",
        "request.steps=20",
        "logger=json",
    ]
    done = run([*command, "launch.threads_per_rank=1", f"hydra.run.dir={tmp_path / 'run'}"])
    assert done.returncode == 0, done.stderr
    summary = record_of(tmp_path / "run").summary
    assert summary.latency_ms.n == 5
    assert 0 < summary.overhead_share.median < 0.1
