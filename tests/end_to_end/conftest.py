"""Real ranks on the built-in checkpoint: one thread each, few steps, every command with a time limit."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import msgspec
import numpy as np
import pytest
from PIL import Image

from harness.records.record import Record, Status, read_record, read_status

LIMIT_S = 180
QUICK = ["launch.threads_per_rank=1", "request.steps=2", "logger=json"]
ENDLESS = "request.steps=10000"


def environment() -> dict[str, str]:
    """This process's, without what a torchrun of ours would inherit, and with waiting threads asleep."""
    ours = ("TORCHELASTIC", "WANDB", "TRIPTYCH")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return kept | {"OMP_WAIT_POLICY": "PASSIVE"}


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "harness", *QUICK, *overrides]


def torchrun(ranks: int, *overrides: str) -> list[str]:
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*runner, "-m", "harness", *QUICK, *overrides]


def agents(nodes: int, port: int, *overrides: str) -> list[list[str]]:
    """The commands of as many torchrun agents, one rank each, that meet at a port of this machine."""
    runner = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    return [[*runner, *meeting, "-m", "harness", *QUICK, *overrides]] * nodes


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=LIMIT_S, env=environment())


def record_of(folder: Path) -> Record:
    record = read_record(folder)
    assert record is not None, f"{folder}: {read_status(folder)}"
    return record


def hashes(folder: Path) -> dict[int, str]:
    """sha256 of the pixels by seed."""
    return {row.seed: row.sha256 for row in record_of(folder).samples}


def difference(one: Path, other: Path) -> int:
    """The largest difference of two runs' 8-bit pictures."""
    return max(
        int(np.abs(np.asarray(Image.open(one / row.path), int) - np.asarray(Image.open(other / row.path), int)).max())
        for row in record_of(one).samples
    )


def processes_about(folder: Path) -> dict[int, str]:
    """Living processes (zombies apart) whose command line or environment names this run's folder."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if str(folder) in line and state != "Z":
            found[int(entry.name)] = line
    return found


def ranks(folder: Path) -> list[int]:
    """Process ids of the ranks of a run, in the order they were started: those with a parent that is about them too."""
    found = [pid for pid, line in processes_about(folder).items() if "harness.engines.rank" in line]
    return sorted(pid for pid in found if parent(pid) in found)


def parent(pid: int) -> int | None:
    """The process that started another one; None of one that has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.1)


@contextmanager
def started(
    arguments: list[str], variables: Mapping[str, str] = MappingProxyType({})
) -> Iterator[subprocess.Popen[str]]:
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    process = subprocess.Popen(arguments, stdout=pipe, stderr=both, text=True, env=environment() | dict(variables))
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=LIMIT_S)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def status_of(folder: Path) -> Status:
    return msgspec.json.decode((folder / "status.json").read_bytes(), type=Status)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures on one rank."""
    folder = tmp_path_factory.mktemp("single") / "run"
    done = run(command("request.prompts=[rocket,red apple,pizza]", "request.seed=5", f"hydra.run.dir={folder}"))
    assert done.returncode == 0, done.stderr
    return folder
