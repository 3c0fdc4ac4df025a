"""The energy that a machine reports, J: of its processor packages (Linux, RAPL), or of a GPU (harness.device.cuda).

It is everything that they use in that time, for whatever process, idle power included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

POWERCAP = Path("/sys/class/powercap")
ZONES = "intel-rapl:[0-9]*"  # AMD's processors have this name too


class EnergyMeter(Protocol):
    """An energy meter that counts from its last reset."""

    def reset(self) -> None:
        """Start counting from now."""

    def used_j(self) -> float | None:
        """Return the energy since the last reset, J, or None if nothing is reported."""


class NoEnergy:
    """A meter without readings: nothing is reported, or another rank of the machine reports it."""

    def reset(self) -> None:
        """Do nothing."""
        pass

    def used_j(self) -> float | None:
        """Return None."""
        return None


class PackageEnergy:
    """All processor packages of this machine, by the counters of the kernel's powercap, which wrap round at a maximum.

    Args:
        folder: The folder of the kernel's files, which on most systems only root may read.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._zones = [zone for zone in sorted(folder.glob(ZONES)) if _is_package(zone)]
        self._before: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Start counting from now."""
        self._before = self._counters()

    def used_j(self) -> float | None:
        """Return the energy of all packages since the last reset, J, or None if none can be read."""
        if not self._zones:
            return None
        ends = [_number(zone / "max_energy_range_uj") for zone in self._zones]
        rows = zip(self._before, self._counters(), ends, strict=True)
        return sum((now - before) % (end + 1) for before, now, end in rows) / 1e6

    def _counters(self) -> list[int]:
        return [_number(zone / "energy_uj") for zone in self._zones]


def _is_package(zone: Path) -> bool:
    """Return whether a zone is a whole package and may be read."""
    try:
        _number(zone / "energy_uj")
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def _number(file: Path) -> int:
    return int(file.read_text())
