"""How much memory this process uses, MiB: the allocator's account on CUDA, the resident set on the CPU."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path
from typing import Protocol

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryMeter(Protocol):
    """A memory account with a resettable peak."""

    def used_mib(self) -> float:
        """In use now."""

    def peak_mib(self) -> float:
        """Largest since the last reset."""

    def reset_peak(self) -> None:
        """Starts a new peak where the platform can; else the peak is the process's."""

    def release(self) -> None:
        """Gives back what was freed and an allocator keeps for later."""


class ResidentMemory:
    """The resident set of this process; the kernel's high-water mark catches peaks between samples (Linux)."""

    def used_mib(self) -> float:
        return _status_mib("VmRSS") if STATUS.exists() else _lifetime_peak_mib()

    def peak_mib(self) -> float:
        return _status_mib("VmHWM") if STATUS.exists() else _lifetime_peak_mib()

    def reset_peak(self) -> None:
        try:
            CLEAR_REFS.write_text("5")
        except OSError:
            return  # not Linux, or not allowed: the peak stays the process's own

    def release(self) -> None:
        if STATUS.exists():
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
            if trim is not None:
                trim(0)


def _lifetime_peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _status_mib(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 2**10
