"""Data sets on real ranks: flat memory, a killed command that goes on, torchrun, shards, and the page's commands."""

import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.records import load
from harness.records.images import FILE, read_images
from harness.records.record import read_status
from tests.fixtures.commands import command, environment, record_of, run, torchrun

PAGE = Path(__file__).parent.parent.parent / "harness/datasets/README.md"
SMALL = ("request.height=32", "request.width=32", "logger.wandb.mode=disabled")
COUNT = 1_500
SETTLED = 500  # images after which memory may no longer grow
GROWTH_MIB = 20
KILLED_AT = 700


def write_prompts(path: Path, count: int) -> Path:
    path.write_text("prompt,category\n" + "".join(f"red apple number {k},{'ab'[k % 2]}\n" for k in range(count)))
    return path


def lines(folder: Path) -> int:
    file = folder / FILE
    return file.read_bytes().count(b"\n") if file.exists() else 0


def resident_mib(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def descendants(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from descendants(int(child))


@pytest.mark.slow
def test_memory_is_flat_and_a_killed_command_goes_on(tmp_path: Path) -> None:
    """With 10,000 prompts: the same numbers at COUNT = 10_000 and KILLED_AT = 3_000."""
    prompts, folder = write_prompts(tmp_path / "prompts.csv", COUNT), tmp_path / "run"
    arguments = command(f"request.prompts_file={prompts}", *SMALL, f"hydra.run.dir={folder}")
    first = subprocess.Popen(arguments, env=environment(), start_new_session=True)
    wait_for(folder, KILLED_AT, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = lines(folder)
    before = {row.index: row.sha256 for row in read_images(folder)}
    assert KILLED_AT <= kept < COUNT
    modified = {path.name: path.stat().st_mtime_ns for path in (folder / "samples").iterdir()}
    second = subprocess.Popen(arguments, env=environment())
    peaks = growth(folder, second)
    assert second.wait() == 0
    rows = [*read_images(folder)]
    assert [row.index for row in rows] == [*range(COUNT)]
    assert {row.index: row.sha256 for row in rows[:kept]} == before
    again = [row.path for row in rows[:kept] if (folder / row.path).stat().st_mtime_ns != modified[Path(row.path).name]]
    assert again == []
    record = record_of(folder)
    assert record.dataset is not None
    assert (record.dataset.images, record.dataset.resumed, len(record.samples)) == (COUNT, kept, 64)
    assert max(peaks.values()) < GROWTH_MIB, peaks


def wait_for(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while lines(folder) < count:
        assert process.poll() is None
        time.sleep(0.05)


def growth(folder: Path, process: subprocess.Popen[bytes]) -> dict[int, float]:
    """Return how much the resident memory of each process grew after it had settled, MiB."""
    began = lines(folder)
    wait_for(folder, min(began + SETTLED, COUNT - 100), process)
    settled = {pid: resident_mib(pid) for pid in descendants(process.pid)}
    largest = dict(settled)
    while process.poll() is None:
        for pid in settled:
            largest[pid] = max(largest[pid], resident_mib(pid))
        time.sleep(0.1)
    return {pid: largest[pid] - settled[pid] for pid in settled}


@pytest.mark.slow
def test_under_torchrun_a_data_set_is_shared_by_replicas_and_goes_on(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.csv", 6)
    own = (f"request.prompts_file={prompts}", *SMALL, "parallel=dp2")
    done = run(torchrun(2, *own, f"hydra.run.dir={tmp_path / 'two'}"))
    assert done.returncode == 0, done.stderr
    done = run(command(f"request.prompts_file={prompts}", *SMALL, f"hydra.run.dir={tmp_path / 'one'}"))
    assert done.returncode == 0, done.stderr
    two, one = ([(row.index, row.sha256) for row in read_images(tmp_path / name)] for name in ("two", "one"))
    assert two == one
    (tmp_path / "two/status.json").write_text('{"state": "failed", "error": "cut off"}')
    (tmp_path / "two" / FILE).write_text("\n".join((tmp_path / "two" / FILE).read_text().splitlines()[:2]) + "\n")
    done = run(torchrun(2, *own, f"hydra.run.dir={tmp_path / 'two'}"))
    assert done.returncode == 0, done.stderr
    assert [(row.index, row.sha256) for row in read_images(tmp_path / "two")] == one
    assert read_status(tmp_path / "two").state == "ok"


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red apple\nrocket\npizza\ncat\n")
    (tmp_path / "prompts.csv").write_text("prompt,category\nred apple,fruit\nrocket,vehicle\n")
    (tmp_path / "PartiPrompts.tsv").write_text("Prompt\tCategory\tChallenge\tNote\nrocket\tVehicles\tBasic\t\n")
    found = [line for line in PAGE.read_text().splitlines() if line.startswith("python -m harness")]
    assert len(found) > 4
    for line in found:
        words = [word for word in shlex.split(line)[3:] if not word.startswith("request.steps")]
        quick = ["load.duration_s=2", "load.warmup_s=0", "load.rate=1"] if "task=load" in words else []
        quick += [f"task.references={tmp_path / 'references'}"] if "task=bench" in words else []
        done = subprocess.run(
            command(*words, *SMALL, *quick),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (line, done.stderr)
    shards = load(tmp_path / "sweeps")
    assert len(shards) == 1
    assert shards["dataset.images"][0] == 4
