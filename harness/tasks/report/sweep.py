"""A tree of records as scored points: quality against network evaluations, one line per solver.

Points are compared at equal network evaluations, not at equal steps: a second-order solver pays twice per step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.metrics.quality import Quality
from harness.records.record import Record, RunFolderError, read_record, read_status


@dataclass(frozen=True)
class SweepPoint:
    """One scored run.

    Attributes:
        family: Name of the family.
        line: Name of the solver, with the settings that differ between this sweep's runs of it.
        steps: Solver steps.
        nfe: Network evaluations per image.
        quality: Scores of the run.
    """

    family: str
    line: str
    steps: int
    nfe: int
    quality: Quality


@dataclass(frozen=True)
class Sweep:
    """The content of a tree of records.

    Attributes:
        points: Scored points, by family, line and evaluations.
        left_out: Reasons why other runs have no point, by folder.
    """

    points: list[SweepPoint]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def families(self) -> list[str]:
        """The families that have points, in the order of FAMILIES, then by name."""
        found = {point.family for point in self.points}
        return [name for name in FAMILIES if name in found] + sorted(found - set(FAMILIES))

    @property
    def lines(self) -> list[str]:
        """All lines of any family, by name."""
        return sorted({point.line for point in self.points})

    def line_points(self, family: str, line: str) -> list[SweepPoint]:
        """Return the points of one line of one family, by evaluations."""
        return [point for point in self.points if (point.family, point.line) == (family, line)]


FAMILIES = {"rectified_flow": "rectified flow", "ddpm": "DDPM", "sgm": "score SDE"}


def read_sweep(folder: Path) -> Sweep:
    """Read every run below a folder.

    Args:
        folder: Folder with run folders at any depth.

    Returns:
        The scored points, and the runs left out.

    Raises:
        ValueError: Two runs share family, line and number of evaluations, or the galleries or prompts differ.
    """
    records: list[Record] = []
    left_out: dict[str, str] = {}
    for file in sorted(folder.rglob("status.json")):
        run = file.parent
        status, name = read_status(run), str(run.relative_to(folder))
        try:
            record = read_record(run)
        except RunFolderError as error:
            left_out[name] = f"unreadable: {error}"
            continue
        if status.state != "ok" or record is None:
            left_out[name] = f"{status.state}: {status.error}"
        elif record.quality is None:
            left_out[name] = next(
                (f"not scored: {note}" for note in record.notes if note.startswith("quality")), "not scored"
            )
        else:
            records.append(record)
    points = sorted(_points(records), key=lambda point: (point.family, point.line, point.nfe))
    _check_comparable(records, points)
    return Sweep(points, left_out)


def best_within_budget(points: Sequence[SweepPoint], budget: int) -> SweepPoint | None:
    """Return the point of a line with the most evaluations within a budget, or None if there is none.

    Args:
        points: Points of one line.
        budget: Largest number of evaluations.

    Returns:
        The point, or None.
    """
    affordable = [point for point in points if point.nfe <= budget]
    return max(affordable, key=lambda point: point.nfe, default=None)


def _points(records: Sequence[Record]) -> list[SweepPoint]:
    groups: defaultdict[tuple[str, str], list[tuple[Record, dict[str, object]]]] = defaultdict(list)
    for record in records:
        settings = flatten(record.config["scheduler"])
        groups[str(settings.pop("family")), str(settings.pop("solver.name"))].append((record, settings))
    points = []
    for (family, solver), runs in groups.items():
        varied = [key for key in runs[0][1] if len({repr(settings.get(key)) for _, settings in runs}) > 1]
        for record, settings in runs:
            line = ", ".join([solver, *(f"{key.removeprefix('solver.')}={settings[key]}" for key in varied)])
            if record.quality is not None:
                steps = int(record.config["request"]["steps"])
                points.append(SweepPoint(family, line, steps, record.statistics.nfe, record.quality))
    return points


def flatten(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested settings by dotted keys."""
    found: dict[str, object] = {}
    for key, value in settings.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _check_comparable(records: Sequence[Record], points: Sequence[SweepPoint]) -> None:
    seen: set[tuple[str, str, int]] = set()
    for point in points:
        key = (point.family, point.line, point.nfe)
        if key in seen:
            raise ValueError(
                f"two runs of {point.family} with {point.line} have {point.nfe} evaluations; give one sweep's folder"
            )
        seen.add(key)
    if len({record.quality.gallery for record in records if record.quality is not None}) > 1:
        raise ValueError(
            "the runs were scored against different galleries, so they do not compare; give one sweep's folder"
        )
    datasets = {None if row is None else (row.sha256, row.prompts, row.shard) for row in (r.dataset for r in records)}
    if len(datasets) > 1 or len({tuple(record.config["request"]["prompts"]) for record in records}) > 1:
        raise ValueError("the runs have different prompts, so they do not compare; give one sweep's folder")
