"""Shorter spinning of OpenMP's threads while other processes use their processors.

GNU's OpenMP library turns at a barrier for GOMP_SPINCOUNT times, and for 1000 times while a process has more OpenMP
threads than processors (GCC, libgomp/config/linux/wait.h, `do_spin`, and `gomp_throttled_spin_count_var` in env.c). A
further team of threads that do nothing makes every wait of the process short, and its end makes them long again.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections import deque
from pathlib import Path

from harness.device.usage import times_by_thread

SAMPLE_S = 0.1
CROWDED = 0.2  # the share of a thread's time without a processor, in two samples, from which the waits are brief
FREE = 0.1  # the mean share of FREE_SAMPLES, under which they are long again
FREE_SAMPLES = 10
BUSY = 0.3  # the share of the interval in which a thread must have wanted to run, to count
log = logging.getLogger(__name__)


def openmp_library() -> ctypes.CDLL | None:
    """Return PyTorch's library of CPU operators, with GNU's OpenMP functions of the copy that it uses.

    Other packages bring copies of their own, whose threads are others.

    Returns:
        The library, or None if PyTorch uses another OpenMP library here.
    """
    import torch

    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None
    is_llvm = hasattr(library, "kmp_set_blocktime")
    return library if hasattr(library, "GOMP_parallel") and not is_llvm else None


def largest_wait(before: dict[str, tuple[float, float]], now: dict[str, tuple[float, float]], wall_s: float) -> float:
    """Return the largest share of its time that a busy thread had no processor.

    Args:
        before: the times that each thread ran and waited, s.
        now: those at the end of the interval.
        wall_s: the length of the interval, s.

    Returns:
        The share; 0 if no thread was busy.
    """
    largest = 0.0
    for name, (ran, waited) in now.items():
        ran_before, waited_before = before.get(name, (ran, waited))
        wanted = ran - ran_before + waited - waited_before
        if wanted > BUSY * wall_s:
            largest = max(largest, (waited - waited_before) / wanted)
    return largest


class BriefWaits:
    """A team of OpenMP threads that sleep, in a thread of its own; while it is there, all waits are brief.

    Args:
        library: what `openmp_library` has returned.
        threads: the number of OpenMP threads of this process.
    """

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        team = max(2, library.omp_get_num_procs() - threads + 2)
        self._end = threading.Event()
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL) does nothing, in any thread

        def hold() -> None:
            library.GOMP_parallel(nothing, None, ctypes.c_uint(team), ctypes.c_uint(0))
            self._end.wait()

        self._thread = threading.Thread(target=hold, name="brief waits", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the team."""
        self._end.set()
        self._thread.join()


class AdaptiveWaits:
    """Makes the waits of this process brief while other processes use its processors, by the kernel's counts.

    Args:
        library: what `openmp_library` has returned.
        threads: the number of OpenMP threads of this process.

    Attributes:
        changes: how often the waits have become brief.
    """

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self.changes = 0
        self._library = library
        self._threads = threads
        self._brief: BriefWaits | None = None
        self._samples = deque([0.0] * FREE_SAMPLES, maxlen=FREE_SAMPLES)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adaptive waits", daemon=True)

    @property
    def is_brief(self) -> bool:
        """Whether the waits are brief now."""
        return self._brief is not None

    def start(self) -> None:
        """Start to look at the times of the threads every SAMPLE_S."""
        self._thread.start()

    def close(self) -> None:
        """Stop, with long waits."""
        self._stop.set()
        self._thread.join()
        self._set_brief(False)

    def observe(self, waited: float) -> None:
        """Take one sample.

        Args:
            waited: what `largest_wait` has returned.
        """
        self._samples.append(waited)
        if min([*self._samples][-2:]) > CROWDED:
            self._set_brief(True)
        elif sum(self._samples) < FREE * FREE_SAMPLES:
            self._set_brief(False)

    def _set_brief(self, brief: bool) -> None:
        if brief and self._brief is None:
            self._brief = BriefWaits(self._library, self._threads)
            self.changes += 1
            log.info("other processes use this rank's processors: its threads spin briefly from now on")
        elif not brief and self._brief is not None:
            self._brief.close()
            self._brief = None
            log.info("this rank's threads have their processors again: they spin for long")

    def _run(self) -> None:
        before = times_by_thread("self") or {}
        while not self._stop.wait(SAMPLE_S):
            now = times_by_thread("self") or {}
            self.observe(largest_wait(before, now, SAMPLE_S))
            before = now


def adaptive_waits(threads: int) -> AdaptiveWaits | None:
    """Start adaptive waits, where several threads wait for one another and the kernel and OpenMP allow it.

    Args:
        threads: the number of OpenMP threads of this process.

    Returns:
        The running object; None with one thread, another OpenMP library or no counts of the kernel.
    """
    library = openmp_library()
    if threads < 2 or library is None or times_by_thread("self") is None:
        return None
    waits = AdaptiveWaits(library, threads)
    waits.start()
    return waits
