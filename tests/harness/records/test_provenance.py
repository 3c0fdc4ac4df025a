"""What a number depends on besides code and weights: the instruction set, as PyTorch chooses it, and variables."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness.records.provenance import arithmetic_environment, cpu_capability, nvidia_gpus

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
