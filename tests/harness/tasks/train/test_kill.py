"""A training that is killed continues from its checkpoint and ends with the bits of an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from harness.records.record import read_status
from harness.resolve.compose import compose_run
from harness.tasks.train.entry import execute
from harness.tasks.train.loop import read_checkpoint
from tests.fixtures.training import TINY, captioned, offline_runs, summary_of

LIMIT_S = 120
STEPS = 300
LINES = range(10, STEPS + 1, 10)
PART = "denoiser-ddpm"
WANTED = [
    *TINY,
    "scheduler=ddpm",
    "train.parts=[denoiser]",
    f"train.denoiser.loop.images={4 * STEPS}",
    "train.denoiser.loop.log_every=10",
    "train.denoiser.loop.save_every_s=0.3",
    "train.denoiser.sample_every=400",
    "logger.wandb.mode=offline",
]


def kill_after_a_checkpoint(overrides: list[str], folder: Path) -> None:
    """Start the command and send SIGKILL once it has written a checkpoint."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    with subprocess.Popen([sys.executable, "-m", "harness", *overrides], env=environment) as process:
        deadline = time.monotonic() + LIMIT_S
        while not (folder / f"{PART}.safetensors").exists():
            assert process.poll() is None, "the training ended before it was killed"
            assert time.monotonic() < deadline, "no checkpoint in time"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(LIMIT_S) == -signal.SIGKILL


def finish(overrides: list[str]) -> None:
    assert execute(compose_run(overrides), Console(quiet=True)).state == "ok"


def curve_of(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_training_ends_as_if_it_had_not_been(tmp_path: Path, dtype: str) -> None:
    data = captioned(tmp_path / "squares")
    same = [*WANTED, f"train.data.folder={data}", f"train.denoiser.dtype={dtype}"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_after_a_checkpoint([*same, f"train.folder={killed}"], killed)
    assert "cut off" in str(read_status(killed).error)
    step = int(read_checkpoint(killed / f"{PART}.safetensors")[1]["step"])
    assert 0 < step < STEPS
    finish([*same, f"train.folder={killed}"])
    finish([*same, f"train.folder={whole}"])

    expected, found = (read_checkpoint(folder / f"{PART}.safetensors")[0] for folder in (whole, killed))
    assert expected.keys() == found.keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    assert (
        [step for step, _ in curve_of(killed)]
        == [step for step, _ in curve_of(whole)]
        == list(range(10, STEPS + 1, 10))
    )
    after = [line for line in curve_of(whole) if line[0] >= step + 10]
    assert after == curve_of(killed)[-len(after) :]

    first, second = offline_runs(killed)
    assert first.name == second.name == f"run-{(killed / 'wandb-ddpm.id').read_text()}.wandb"
    summary = summary_of(second)
    assert (summary["state"], summary["exit_code"], summary["summary"]["state"]) == ("finished", 0, "ok")
    assert summary["summary"][f"{PART}/images"] == 4 * STEPS


@pytest.mark.slow
def test_an_interrupted_training_says_so_and_ends_its_wandb_run(tmp_path: Path) -> None:
    folder, data = tmp_path / "run", captioned(tmp_path / "squares")
    overrides = [*WANTED, f"train.data.folder={data}", f"train.folder={folder}", "train.denoiser.loop.images=4000000"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    with subprocess.Popen([sys.executable, "-m", "harness", *overrides], env=environment) as process:
        deadline = time.monotonic() + LIMIT_S
        while not (folder / "curve.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 130
    assert read_status(folder).state == "cancelled"
    (log,) = offline_runs(folder)
    assert (summary_of(log)["exit_code"], summary_of(log)["summary"]["state"]) == (1, "cancelled")
