"""The memory of this process in MiB: the allocator's count on CUDA, the resident set on the CPU."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path
from typing import Protocol

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryMeter(Protocol):
    """A memory meter with a peak that can be reset."""

    def used_mib(self) -> float:
        """Return the memory in use now, MiB."""

    def peak_mib(self) -> float:
        """Return the peak since the last reset, MiB."""

    def reset_peak(self) -> None:
        """Start a new peak if the platform can; otherwise the peak is that of the process."""

    def release(self) -> None:
        """Return memory that was freed and is kept by an allocator."""


class ResidentMemory:
    """The resident set of this process; the kernel's high-water mark includes peaks between samples (Linux)."""

    def used_mib(self) -> float:
        """Return the resident set now, MiB."""
        return _status_mib("VmRSS") if STATUS.exists() else _lifetime_peak_mib()

    def peak_mib(self) -> float:
        """Return the high-water mark since the last reset, MiB."""
        return _status_mib("VmHWM") if STATUS.exists() else _lifetime_peak_mib()

    def reset_peak(self) -> None:
        """Reset the kernel's high-water mark if this process may."""
        try:
            CLEAR_REFS.write_text("5")
        except OSError:
            return  # not Linux, or not allowed: the peak stays the process's own

    def release(self) -> None:
        """Return freed memory to the system, with glibc."""
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
