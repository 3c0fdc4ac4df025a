"""What people read: tables and grids show any prompt unchanged and quickly; a fault of wandb does not spread."""

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from harness.config.schema import RunConfig, WandbMode
from harness.engines.protocol import Engine
from harness.loggers.table import print_sweep
from harness.loggers.wandb import logged_in, resolve_mode
from harness.records import load
from harness.records.job import JobResult
from harness.records.media import GRID_CELL, grid, to_uint8
from harness.records.record import RunFolder, Status, read_status
from harness.resolve.compose import compose_run, from_yaml, to_yaml
from harness.tasks import generate
from tests.fixtures.records import record


def black(count: int) -> list[np.ndarray]:
    return [np.zeros((64, 64, 3), np.uint8)] * count


@pytest.mark.parametrize("caption", ["two\nlines", "x" * 8000, "", "ünïcode 🍎"])
def test_any_prompt_is_a_caption_and_quickly(caption: str) -> None:
    start = time.monotonic()
    sheet = grid(black(1), [caption])
    assert time.monotonic() - start < 5  # an 8,000-character prompt once took half a minute
    assert sheet.width == GRID_CELL + 16


def test_a_grid_is_nearly_square_and_shows_every_image() -> None:
    images = [np.full((64, 64, 3), value, np.uint8) for value in range(0, 250, 50)]
    sheet = np.asarray(grid(images, ["a"] * 5))
    assert {0, 50, 100, 150, 200} <= set(sheet[..., 0].ravel().tolist())
    assert sheet.shape[1] > sheet.shape[0]


def test_pixels_are_rounded_to_nearest() -> None:
    values = np.array([0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0], np.float32).reshape(1, 1, 5).repeat(3, axis=0)
    assert to_uint8(values)[0, :, 0].tolist() == [0, 0, 1, 255, 255]


def shown_sweep(jobs: list[JobResult]) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_sweep(jobs, console)
    return console.export_text()


def test_a_sweeps_table_shows_the_job_and_not_what_else_is_in_its_folder(tmp_path: Path) -> None:
    """A job whose folder holds another run has no numbers; the same folder's own run has."""
    run = RunFolder.claim(tmp_path / "a")
    run.write_record(record(latency_ms=1234.5))
    run.finish(Status("ok"))
    refused = JobResult(run.path, Status("failed", "already holds a run"), owns_folder=False)
    assert "1234.5" in shown_sweep([JobResult(run.path, Status("ok")), JobResult(tmp_path / "b", Status("failed"))])
    shown = shown_sweep([refused, JobResult(tmp_path / "b", Status("failed", "another"))])
    assert "1234.5" not in shown
    assert shown.count("failed") == 2
    assert "ok" not in shown


@pytest.mark.parametrize("text", ["[/b]", "[red]", "request.prompts=[a,b]"])
def test_a_sweeps_table_shows_brackets_as_they_are(tmp_path: Path, text: str) -> None:
    failed = Status("failed", f"because of {text}")
    shown = shown_sweep([JobResult(tmp_path / f"{name}{text.replace('/', '')}", failed) for name in ("x", "y")])
    assert f"because of {text}" in shown
    assert shown.count("because of") == 1  # each error once, below the table
    assert shown.count("failed 1") == 2
    assert all(part in shown for part in f"y{text.replace('/', '')}".split(","))


@pytest.mark.parametrize("prompt", ["costs ${oc.env:HOME}", "${b}", "a: b # c", "'\"\\", "[/b]\n"])
def test_a_prompt_reaches_the_ranks_as_it_was_written(prompt: str) -> None:
    config = compose_run([]).config
    config.request.prompts = [prompt]
    assert from_yaml(to_yaml(config)).request.prompts == [prompt]


def test_a_fault_of_wandb_is_not_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("harness.tasks.common.lifecycle.log_failure", broken)
    composed = compose_run(["request.prompt=a", f"hydra.run.dir={tmp_path / 'run'}"])

    def make(config: RunConfig, folder: Path) -> Engine:
        raise ValueError("no ranks today")

    assert generate.execute(composed, Console(), make) == Status("failed", "no ranks today")
    assert "wandb did not take it" in capsys.readouterr().err
    assert list(load(tmp_path)["error"]) == ["no ranks today"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_one_line_with_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """An image does not fit, and then the status does not either; the one on disk says that the run has failed."""

    def make(config: RunConfig, folder: Path) -> Engine:
        def full(*arguments: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", full)
        raise OSError(number, os.strerror(number))

    composed = compose_run(["logger=json", f"hydra.run.dir={tmp_path / 'run'}"])
    status = generate.execute(composed, Console(), make)
    assert status.state == read_status(tmp_path / "run").state == "failed"
    assert "free some space, or choose another disk with hydra.run.dir=..." in str(status.error)
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.rglob(".*.json.*"))


def test_wandb_is_online_only_for_who_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not logged_in()
    assert resolve_mode(WandbMode.auto) == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert resolve_mode(WandbMode.auto) == "online"
    (tmp_path / ".netrc").write_text("machine api.forge.coreweave.com\n  login user\n  password secret\n")
    assert logged_in()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode(WandbMode.auto) == "disabled"
    assert resolve_mode(WandbMode.offline) == "offline"
