"""The energy that a machine says it uses, J: its processor packages' (Linux, RAPL), or a GPU's (harness.device.cuda).

It is all that they use meanwhile, whoever it is for, and at rest too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

POWERCAP = Path("/sys/class/powercap")
ZONES = "intel-rapl:[0-9]*"  # AMD's processors are under this name too


class EnergyMeter(Protocol):
    """An energy meter that counts from its last reset."""

    def reset(self) -> None:
        """Counts from now on."""

    def used_j(self) -> float | None:
        """Since the last reset, J; None where nothing is reported."""


class NoEnergy:
    """Where nothing is reported, or another rank of the machine reports it."""

    def reset(self) -> None:
        pass

    def used_j(self) -> float | None:
        return None


class PackageEnergy:
    """All processor packages of this machine, by the counters of the kernel's powercap, which start again at an end.

    Args:
        folder: of the kernel's files, which most systems let no one but root read.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._zones = [zone for zone in sorted(folder.glob(ZONES)) if _is_package(zone)]
        self._before: list[int] = []
        self.reset()

    def reset(self) -> None:
        self._before = self._counters()

    def used_j(self) -> float | None:
        if not self._zones:
            return None
        ends = [_number(zone / "max_energy_range_uj") for zone in self._zones]
        rows = zip(self._before, self._counters(), ends, strict=True)
        return sum((now - before) % (end + 1) for before, now, end in rows) / 1e6

    def _counters(self) -> list[int]:
        return [_number(zone / "energy_uj") for zone in self._zones]


def _is_package(zone: Path) -> bool:
    """Whether a zone is a package, not a part of one, and may be read."""
    try:
        _number(zone / "energy_uj")
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def _number(file: Path) -> int:
    return int(file.read_text())
