"""How busy processors were: the CPU time of this process, and of everything on this machine (Linux's /proc/stat)."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

STAT = Path("/proc/stat")


class ProcessUsage(NamedTuple):
    """What this process used since it began: CPU time, s, and how often another process took its processor."""

    cpu_s: float
    involuntary_switches: int

    @classmethod
    def now(cls) -> ProcessUsage:
        """Return the use so far, of all threads."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return cls(used.ru_utime + used.ru_stime, used.ru_nivcsw)

    def since(self, before: ProcessUsage) -> ProcessUsage:
        """Return the use between two moments."""
        return ProcessUsage(self.cpu_s - before.cpu_s, self.involuntary_switches - before.involuntary_switches)


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
