"""What a search can optimise: values of a run's record, and which way each is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.config.yaml import ConfigError
from harness.records.job import JobResult
from harness.records.record import Record
from harness.records.search import Measured

MINIMIZE, MAXIMIZE = "minimize", "maximize"
METRIC = "metrics."  # the prefix of a plug-in's metric


@dataclass(frozen=True)
class SearchObjective:
    """A value of the record.

    Attributes:
        direction: Word minimize or maximize; empty if it is not known which is better.
        paths: Attributes of the record, with dots; the first that is there counts.
        key: Configuration key without which no record has the value; empty if there is none.
    """

    direction: str
    paths: tuple[str, ...]
    key: str = ""

    def value(self, record: Record) -> float | None:
        """Return the value in a record, or None if the record does not have it."""
        found = (_value_at(record, path) for path in self.paths)
        return next((value for value in found if value is not None), None)


def _value_at(record: Record, path: str) -> float | None:
    """Return the value at a dotted path, or None if a part of the path is missing in this record."""
    value: Any = record
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part)
        if value is None:
            return None
    return float(value)


OBJECTIVES = {
    "latency_ms": SearchObjective(MINIMIZE, ("summary.latency_ms.median", "load.latency_ms.p50")),
    "step_ms": SearchObjective(MINIMIZE, ("summary.step_ms.median",)),
    "peak_memory_mib": SearchObjective(MINIMIZE, ("summary.peak_memory_mib_max",)),
    "energy_j": SearchObjective(MINIMIZE, ("summary.energy_j.median",)),
    "error": SearchObjective(MINIMIZE, ("fidelity.pixel.rel_l2",), "task.fidelity"),
    "latent_error": SearchObjective(MINIMIZE, ("fidelity.latent.rel_l2",), "task.fidelity"),
    "top1": SearchObjective(MAXIMIZE, ("quality.top1.value",)),
    "distance": SearchObjective(MINIMIZE, ("quality.distance.value",)),
    "clip_score": SearchObjective(MAXIMIZE, ("pretrained.clip_score.value",), "quality.clip"),
    "frechet": SearchObjective(MINIMIZE, ("pretrained.frechet.value",), "quality.features"),
}


def objective(name: str) -> SearchObjective | None:
    """Return an objective by its name, or None if there is none; a plug-in's metric has no direction of its own."""
    return SearchObjective("", (name,), "quality.metrics") if name.startswith(METRIC) else OBJECTIVES.get(name)


def resolve_directions(names: Sequence[str], directions: Sequence[str] | None) -> list[str]:
    """Return the direction of each objective.

    Args:
        names: The objectives.
        directions: Directions that were given for all of them; None takes those of the objectives.

    Returns:
        minimize or maximize, for each objective.

    Raises:
        ConfigError: An objective is unknown, or a direction is missing or wrong.
    """
    for key, value in (("objectives", names), ("directions", directions or [])):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"hydra.sweeper.{key}={value}; give a list, such as hydra.sweeper.{key}=[{value}]")
    found = [objective(name) for name in names]
    for name, each in zip(names, found, strict=True):
        if each is None:
            known = ", ".join([*OBJECTIVES, f"{METRIC}NAME"])
            raise ConfigError(f"hydra.sweeper.objectives has {name!r}; there are {known}")
        if not each.direction and directions is None:
            raise ConfigError(f"whether {name} is better low or high is not known; add hydra.sweeper.directions=[...]")
    if not names or len({*names}) < len(names):
        raise ConfigError("hydra.sweeper.objectives names one objective or several, each once, such as [latency_ms]")
    chosen = [each.direction for each in found if each is not None] if directions is None else [*directions]
    if len(chosen) != len(names) or {*chosen} - {MINIMIZE, MAXIMIZE}:
        raise ConfigError(f"hydra.sweeper.directions has one of {MINIMIZE} and {MAXIMIZE} for each objective")
    return chosen


def measure(job: JobResult, names: Sequence[str]) -> Measured:
    """Return the objectives of a finished job; a job that did not end well has none, and is never the best.

    Args:
        job: The job.
        names: The objectives.

    Returns:
        The values, or the reason why there are none.
    """
    folder, record = job.folder.name, job.record() if job.status.state == "ok" else None
    if record is None:
        return Measured(folder, None, job.status.error or f"{job.status.state}, without a record")
    bound = record.config["task"]["max_pixel_error"]
    if bound is not None and (record.fidelity is None or not record.fidelity.pixel.rel_l2 <= bound):
        return Measured(folder, None, f"its pixels are further from the reference than task.max_pixel_error={bound:g}")
    values = [each.value(record) for each in map(objective, names) if each is not None]
    for name, value in zip(names, values, strict=True):
        if value is None or not math.isfinite(value):
            return Measured(folder, None, f"its record has no finite {name}")
    return Measured(folder, [value for value in values if value is not None])
