"""Faults of every kind end with one clear line, a matching status, an exit status, and no process left."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import harness
from harness.engines.environment import SOCKETS
from models.registry import REFERENCE
from tests.fixtures.commands import (
    ENDLESS,
    LIMIT_S,
    command,
    cpu_seconds,
    environment_of,
    parent,
    processes_about,
    ranks,
    run,
    started,
    status_of,
    torchrun,
    wait_for,
)
from tests.fixtures.faults import planted

ONE = "request.prompt=rocket"


def generates(folder: Path, count: int) -> bool:
    """Return whether all ranks of a run have loaded and worked for a while (their agent did the imports)."""
    if len(ranks(folder)) != count:
        return False
    return all(int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11]) > 200 for pid in ranks(folder))


def wait_generating(folder: Path, count: int) -> None:
    wait_for(lambda: generates(folder, count), "the ranks to draw")


def one_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("triptych:")]
    assert len(lines) == 1, output
    return lines[0]


def test_a_rank_killed_while_denoising(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = [ENDLESS, "request.prompts=[a,b]", "parallel=dp2", f"hydra.run.dir={folder}"]
    with started(command(*overrides)) as process:
        wait_generating(folder, 2)
        os.kill(ranks(folder)[-1], signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "died with SIGKILL" in one_line(output)
    status = status_of(folder)
    assert status.state == "failed"
    assert "rank 1 died with SIGKILL" in (status.error or "")
    assert not processes_about(folder)


SAYS = {
    "killed": "rank 1 died with SIGKILL",
    "raises": "rank 1: planted fault",
    "stopped": "rank 0: another rank did not answer within 5 s",
}


def seconds_to_end(process: "subprocess.Popen[str]", tmp_path: Path) -> float:
    """Return the seconds from the planted fault to the end of the run, with its output read."""
    process.communicate(timeout=LIMIT_S)
    return time.time() - (tmp_path / "fault").stat().st_mtime


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "layout"),
    [("killed", "ulysses2"), ("raises", "ring2"), ("stopped", "ring2")],
)
def test_a_rank_that_ends_inside_a_collective_ends_the_run(tmp_path: Path, end: str, layout: str) -> None:
    folder = tmp_path / "run"
    overrides = [ENDLESS, ONE, f"parallel={layout}", f"hydra.run.dir={folder}"]
    if end == "stopped":
        overrides.append("launch.collective_timeout_s=5")
    with started(command(*overrides), planted(tmp_path, end)) as process:
        assert seconds_to_end(process, tmp_path) < 60
    assert process.returncode == 1
    assert status_of(folder).state == "failed"
    assert SAYS[end] in (status_of(folder).error or "")
    assert not processes_about(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "layout", "says"),
    [("killed", "ulysses2", "torchrun's output says which"), ("raises", "ring2", SAYS["raises"])],
)
def test_a_rank_that_ends_inside_a_collective_of_the_users_own_torchrun(
    tmp_path: Path, end: str, layout: str, says: str
) -> None:
    folder = tmp_path / "run"
    overrides = [ENDLESS, ONE, f"parallel={layout}", f"hydra.run.dir={folder}"]
    with started(torchrun(2, *overrides), planted(tmp_path, end)) as process:
        assert seconds_to_end(process, tmp_path) < 60
    assert process.returncode != 0
    assert says in (status_of(folder).error or "")
    wait_for(lambda: not processes_about(folder), "every process to end", 10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_denoising(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    with started(command(ENDLESS, ONE, f"hydra.run.dir={folder}")) as process:
        wait_generating(folder, 1)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert status_of(folder).state == "cancelled"
    assert not processes_about(folder)


def test_an_interrupt_while_starting(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(command(ENDLESS, ONE, f"hydra.run.dir={folder}")) as process:
        wait_for((folder / "logs" / "launch.log").exists, "torchrun to start")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert status_of(folder).state == "cancelled"
    wait_for(lambda: not processes_about(folder), "every process to end", 10)


def test_ranks_outlive_a_stop_of_the_one_who_started_them_and_end_with_its_kill(tmp_path: Path) -> None:
    """A stopped process runs no code of its own, so the kernel has to end it."""
    folder = tmp_path / "run"
    overrides = [ENDLESS, "request.prompts=[a,b]", "parallel=dp2", f"hydra.run.dir={folder}"]
    with started(command(*overrides)) as process:
        wait_generating(folder, 2)
        stopped_rank, rank = ranks(folder)
        sockets = Path(environment_of(rank)[SOCKETS])
        assert sockets.is_dir()
        process.send_signal(signal.SIGSTOP)
        used = cpu_seconds(rank)
        wait_for(lambda: cpu_seconds(rank) > used + 1, "the ranks to go on")
        agent = parent(stopped_rank)
        server = None if agent is None else parent(agent)
        assert agent is not None
        assert server is not None
        for pid in (stopped_rank, agent, server):
            os.kill(pid, signal.SIGSTOP)
        process.kill()
        process.wait(timeout=10)
        wait_for(lambda: not processes_about(folder), "every process to end", 20)
    assert not sockets.exists()
    assert status_of(folder).state == "failed"


@pytest.mark.slow
def test_an_interrupt_under_a_torchrun_of_the_users_own(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = [ENDLESS, "request.prompts=[a,b]", "parallel=dp2", f"hydra.run.dir={folder}"]
    with started(torchrun(2, *overrides)) as process:
        wait_for(lambda: (folder / "logs" / "rank1.log").exists(), "rank 1 to start")
        time.sleep(8)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode != 0
    assert status_of(folder).state == "cancelled"
    wait_for(lambda: not processes_about(folder), "every process to end", 10)


@pytest.mark.slow
def test_a_rank_killed_under_a_torchrun_of_the_users_own(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    overrides = [ENDLESS, "request.prompts=[a,b]", "parallel=dp2", f"hydra.run.dir={folder}"]
    with started(torchrun(2, *overrides)) as process:
        wait_for(lambda: (folder / "logs" / "rank1.log").exists(), "rank 1 to start")
        time.sleep(8)
        victims = [pid for pid, line in processes_about(folder).items() if "distributed.run" not in line]
        os.kill(max(victims), signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert status_of(folder).state == "failed"
    assert one_line(output).startswith("triptych: failed:")
    wait_for(lambda: not processes_about(folder), "every process to end", 10)


@pytest.mark.slow
def test_weights_of_another_shape_are_named_by_the_rank_that_reads_them(tmp_path: Path) -> None:
    folder, checkpoint = tmp_path / "run", Path(shutil.copytree(REFERENCE / "emoji", tmp_path / "checkpoint"))
    weights = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"] = tensors["proj_out.bias"][:-1].clone()
    save_file(tensors, weights)
    done = run(command(ONE, f"model.path={checkpoint}", f"hydra.run.dir={folder}"))
    assert done.returncode == 1
    assert "project_out.bias is (15,), the network has (16,)" in one_line(done.stderr)
    assert "project_out.bias" in (status_of(folder).error or "")
    assert not processes_about(folder)


def test_an_occupied_folder_is_left_alone(single: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in single.rglob("*")}
    done = run(command(ONE, f"hydra.run.dir={single}"))
    assert done.returncode == 2
    assert "already holds a run" in one_line(done.stderr)
    assert {path: path.stat().st_mtime_ns for path in single.rglob("*")} == before


@pytest.mark.parametrize("start", [command, lambda *overrides: torchrun(2, *overrides)], ids=["ours", "torchrun"])
def test_bad_input_leaves_a_status_and_starts_nothing(tmp_path: Path, start) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "run"
    done = run(start("parallel=dp2", "request.steps=0", f"hydra.run.dir={folder}"))
    assert done.returncode != 0
    assert "request.steps=0; give 1 to" in one_line(done.stderr)
    assert status_of(folder).error == "request.steps=0; give 1 to 10000"
    assert not (folder / "logs" / "launch.log").exists()


def test_torchrun_with_another_number_of_ranks(tmp_path: Path) -> None:
    done = run(torchrun(2, ONE, f"hydra.run.dir={tmp_path / 'run'}"))
    assert done.returncode != 0
    assert "use parallel.dp=2 or torchrun --nproc-per-node 1" in one_line(done.stderr)


def test_a_termination_in_the_middle_of_an_exec_has_its_own_exit_status(tmp_path: Path) -> None:
    """Libraries create classes with exec() at import time, and CPython keeps an exception that passes through one."""
    (tmp_path / "terminated.py").write_text(
        "import os, signal\n"
        "from harness import cli\n"
        "cli.dispatch = lambda arguments: exec('os.kill(os.getpid(), signal.SIGTERM)')\n"
        "cli.main()\n"
    )
    paths = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(harness.__file__).parent.parent}"}
    assert subprocess.run([sys.executable, "-m", "terminated"], env=paths, timeout=60).returncode == 130
