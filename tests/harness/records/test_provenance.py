"""What a number depends on besides code and weights: the instruction set, as PyTorch chooses it, and variables."""

import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import harness
from harness.messages import EngineInfo
from harness.records.provenance import (
    ROOT,
    Beginning,
    Git,
    arithmetic_environment,
    cpu_capability,
    cpu_flags,
    git_state,
    nvidia_gpus,
    provenance,
    sources_hash,
)

FORCED = (None, "avx2", "default", "AVX2", "")
CHOSEN_BY_TORCH = """
import os, torch
for value in {forced}:
    if os.fork() == 0:  # torch chooses once in a process
        if value is not None:
            os.environ["ATEN_CPU_CAPABILITY"] = value
        print(torch.backends.cpu.get_cpu_capability(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_the_capability_is_the_one_that_torch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    command = [sys.executable, "-W", "ignore", "-c", CHOSEN_BY_TORCH.format(forced=FORCED)]
    theirs = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    ours = []
    for value in FORCED:
        if value is not None:
            monkeypatch.setenv("ATEN_CPU_CAPABILITY", value)
        ours.append(cpu_capability())
    assert ours == theirs


def test_what_can_change_a_float_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = arithmetic_environment()
    assert before["cpu_capability"] == cpu_capability()
    for name, value in (
        ("ATEN_CPU_CAPABILITY", "default"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2"),
        ("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
        ("NVIDIA_TF32_OVERRIDE", "1"),
        ("LD_PRELOAD", ""),
    ):
        monkeypatch.setenv(name, value)
        after = arithmetic_environment()
        assert after != before, name
        assert after[name] == value
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "name",
    [
        "OMP_NUM_THREADS",  # launch.threads_per_rank decides it, and torchrun sets it
        "MKL_CBWR",  # launch.reproducible decides it
        "TORCHELASTIC_RUN_ID",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "OMP_WAIT_POLICY",
        "TORCH_HUB_TOKEN",
        "PATH",
    ],
)
def test_what_changes_no_float_is_not(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv(name, raising=False)
    before = arithmetic_environment()
    monkeypatch.setenv(name, "3")
    assert arithmetic_environment() == before


def test_the_gpus_are_read_where_the_driver_lists_them(tmp_path: Path) -> None:
    assert nvidia_gpus(tmp_path) == ("", "")
    for number, name in enumerate(("NVIDIA H200", "NVIDIA A10")):
        folder = tmp_path / "gpus" / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 18\n")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54\nGCC version:\n")
    models, driver = nvidia_gpus(tmp_path)
    assert models == "NVIDIA A10, NVIDIA H200"
    assert "550.54" in driver


def test_the_environment_of_a_record_has_what_matters_and_no_secret() -> None:
    given = {
        "OMP_NUM_THREADS": "2",
        "MALLOC_ARENA_MAX": "1",
        "LD_PRELOAD": "libjemalloc.so",
        "NCCL_ALGO": "Ring",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "NCCL_TOKEN": "hidden",
        "TRIPTYCH_SOCKETS": "/tmp/x",
        "WANDB_API_KEY": "hidden",
        "HOME": "/",
    }
    found = provenance(EngineInfo("ready", 1, [1]), given).environment
    assert set(found) == set(list(given)[:5])
    assert found["MALLOC_ARENA_MAX"] == "1"


def test_a_record_says_when_and_how_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ["python", "-m", "harness", "request.prompt=a=b", "model.text.tokens=24", "model.text.tokenizer.path=x"]
    monkeypatch.setattr(sys, "orig_argv", [*plain, "+api_key=abc", "--hub-token=abc", "token=abc"])
    beginning = Beginning.now()
    assert beginning.command == [*plain, "+api_key=...", "--hub-token=...", "token=..."]
    found = provenance(EngineInfo("ready", 1, [1], cpu_capability="AVX2"), {}, beginning)
    times = [datetime.fromisoformat(text) for text in (found.started, found.ended)]
    assert all(time.utcoffset() == timedelta(0) for time in times)
    assert times[0] <= times[1] <= datetime.now(UTC)
    assert found.cpu is not None
    assert found.cpu.capability == "AVX2"  # what the rank said, not what this process would choose
    assert not set(found.cpu.flags) - cpu_flags()


def test_an_edit_of_any_source_changes_the_hash(tmp_path: Path) -> None:
    root = Path(harness.__file__).parents[1]
    for name in ("harness/cli.py", "models/registry.py", "schedulers/build.py", "conf/config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    before = sources_hash(tmp_path)
    assert before == sources_hash(tmp_path)
    assert sources_hash(root) == Beginning.now().sources_sha256
    for name in ("conf", "harness", "models", "schedulers"):
        file = next(path for path in (tmp_path / name).iterdir() if path.is_file())
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert sources_hash(tmp_path) != before, name
        file.write_bytes(content)
    cached = tmp_path / "harness" / "__pycache__" / "cli.pyc"
    cached.parent.mkdir()
    cached.write_bytes(b"compiled")
    assert sources_hash(tmp_path) == before


def test_the_commit_of_a_checkout_is_found_and_no_other_ones(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert git_state(tmp_path) is None
    git("init", "-q")
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "cli.py").write_text("")
    git("add", "-A")
    git("commit", "-qm", "Begin")
    assert git_state(tmp_path) == Git(git("rev-parse", "HEAD"), dirty=False)
    (tmp_path / "harness" / "cli.py").write_text("edited = True")
    assert git_state(tmp_path) == Git(git("rev-parse", "HEAD"), dirty=True)
    assert git_state(tmp_path / "harness") is None  # an installed copy inside somebody else's checkout


def test_a_record_of_this_checkout_has_its_commit() -> None:
    """The folder that is looked at is the one of the packages, wherever this module lies in them."""
    assert Path(harness.__file__).parents[1] == ROOT
    here = provenance(EngineInfo("ready", 1, [1]), {}).git
    assert (here is not None) == (ROOT / ".git").exists()
