"""How busy processors were: the CPU time of a process, how long it waited for one, and the use of the whole machine."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STAT = Path("/proc/stat")


class ProcessUsage(NamedTuple):
    """What a process used since it began.

    CPU time and wall time part when others use its processors, but also when its threads sleep. The kernel counts the
    two apart: a thread that waits could run, and has no processor.

    Attributes:
        cpu_s: CPU time, s.
        involuntary_switches: How often another process took its processor; 0 of another process than this one.
        waited_s: Time that its threads waited for a processor, summed over threads, s; None where the kernel does not
            say.
    """

    cpu_s: float
    involuntary_switches: int
    waited_s: float | None = None

    @classmethod
    def now(cls) -> ProcessUsage:
        """Return the use of this process so far, of all threads."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        times = thread_times("self")
        return cls(used.ru_utime + used.ru_stime, used.ru_nivcsw, None if times is None else times[1])

    @classmethod
    def of(cls, pid: int) -> ProcessUsage | None:
        """Return the use of another process so far, of its living threads, or None if the kernel does not say."""
        times = thread_times(pid)
        return None if times is None else cls(times[0], 0, times[1])

    def since(self, before: ProcessUsage) -> ProcessUsage:
        """Return the use between two moments."""
        both = self.waited_s is not None and before.waited_s is not None
        waited_s = max(0.0, (self.waited_s or 0.0) - (before.waited_s or 0.0)) if both else None
        switches = self.involuntary_switches - before.involuntary_switches
        return ProcessUsage(self.cpu_s - before.cpu_s, switches, waited_s)


def times_by_thread(pid: int | str) -> dict[str, tuple[float, float]] | None:
    """Return the times that each living thread of a process ran, and waited for a processor, s.

    Args:
        pid: Id of the process, or `self`.

    Returns:
        The two times by the id of the thread (Linux's schedstat); None where the kernel does not say, or the process
        has ended.
    """
    found = {}
    try:
        for name in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{name}/schedstat") as file:
                ran, waited, _ = file.read().split()
            found[name] = int(ran) / 1e9, int(waited) / 1e9
    except OSError:
        return None
    return found


def thread_times(pid: int | str) -> tuple[float, float] | None:
    """Return the two times of `times_by_thread`, summed over the threads."""
    times = times_by_thread(pid)
    return None if times is None else (sum(ran for ran, _ in times.values()), sum(w for _, w in times.values()))


def waited_share(parts: Sequence[tuple[float, float | None]]) -> float | None:
    """Return the share of the time that threads could have run in which they waited for a processor.

    Args:
        parts: CPU time and waiting time of each process, s.

    Returns:
        The share, or None if one of them is unknown.
    """
    if not parts or any(waited_s is None for _, waited_s in parts):
        return None
    waited_s = sum(waited_s or 0.0 for _, waited_s in parts)
    return waited_s / max(1e-9, waited_s + sum(cpu_s for cpu_s, _ in parts))


class MachineUsage(NamedTuple):
    """What all processes of this machine used since it began, or between two moments.

    Attributes:
        wall_s: Time, s.
        busy_s: CPU time of all processes, s; None where the kernel does not say.
        steal_s: CPU time that the hypervisor gave to others, s; None where the kernel does not say.
        client_s: CPU time of this process, s.
    """

    wall_s: float
    busy_s: float | None
    steal_s: float | None
    client_s: float

    @classmethod
    def now(cls, stat: Path = STAT) -> MachineUsage:
        """Return the use so far.

        Args:
            stat: The kernel's file; its first line has user, nice, system, idle, iowait, irq, softirq and steal.

        Returns:
            The use.
        """
        busy_s = steal_s = None
        try:
            with stat.open() as file:
                ticks = [int(part) for part in file.readline().split()[1:9]]
            user, nice, system, _, _, irq, softirq, steal = ticks
            rate = os.sysconf("SC_CLK_TCK")
            busy_s, steal_s = (user + nice + system + irq + softirq) / rate, steal / rate
        except (OSError, ValueError):
            pass  # not Linux
        return cls(time.perf_counter(), busy_s, steal_s, ProcessUsage.now().cpu_s)

    def since(self, before: MachineUsage) -> MachineUsage:
        """Return the use between two moments."""
        return MachineUsage(
            self.wall_s - before.wall_s,
            None if self.busy_s is None or before.busy_s is None else self.busy_s - before.busy_s,
            None if self.steal_s is None or before.steal_s is None else self.steal_s - before.steal_s,
            self.client_s - before.client_s,
        )


def load_average() -> float | None:
    """Return how many processes ran or waited to run, as the mean of about a minute, or None if it is not known."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None
