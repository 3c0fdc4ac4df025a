"""Freed memory is reused by the next tensor, and goes back to the system on request."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from harness.device.memory import ResidentMemory
from harness.device.malloc import retain_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(16 << 20).add_(1)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert retain_freed_memory()
faults(), faults(), faults()  # until what is small lies elsewhere
memory, again = ResidentMemory(), faults()
held = memory.used_mib()
memory.release()
print(again, held, memory.used_mib())
"""


def measured(how: str) -> tuple[int, float, float]:
    ran = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    again, held, released = ran.stdout.split()
    return int(again), float(held), float(released)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of another library")
def test_pages_are_touched_once_and_given_back() -> None:
    plain, _, _ = measured("plain")
    kept, held, released = measured("keep")
    assert kept < 0.1 * plain
    assert held - released > 50
