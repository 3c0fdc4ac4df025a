"""What a search can optimise: values of a run's record, and which way each is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.config.yaml import ConfigError
from harness.records.job import JobResult
from harness.records.record import Record
from harness.records.search import Measured

MINIMIZE, MAXIMIZE = "minimize", "maximize"
METRIC = "metrics."  # the prefix of a plug-in's metric


@dataclass(frozen=True)
class Objective:
    """A value of the record.

    Attributes:
        direction: minimize or maximize.
        value: Function that returns it; None if the record does not have it.
        key: Configuration key without which no record has it; empty if there is none.
    """

    direction: str
    value: Callable[[Record], float | None]
    key: str = ""


def latency_ms(record: Record) -> float | None:
    """Return the median latency of a request, ms."""
    if record.summary is not None:
        return record.summary.latency_ms.median
    return None if record.load is None or record.load.latency_ms is None else record.load.latency_ms.p50


OBJECTIVES: dict[str, Objective] = {
    "latency_ms": Objective(MINIMIZE, latency_ms),
    "step_ms": Objective(MINIMIZE, lambda row: row.summary and row.summary.step_ms.median),
    "peak_memory_mib": Objective(MINIMIZE, lambda row: row.summary and row.summary.peak_memory_mib_max),
    "energy_j": Objective(
        MINIMIZE, lambda row: None if not row.summary or not row.summary.energy_j else row.summary.energy_j.median
    ),
    "error": Objective(MINIMIZE, lambda row: row.fidelity and row.fidelity.pixel.rel_l2, "task.fidelity"),
    "latent_error": Objective(MINIMIZE, lambda row: row.fidelity and row.fidelity.latent.rel_l2, "task.fidelity"),
    "top1": Objective(MAXIMIZE, lambda row: row.quality and row.quality.top1.value),
    "distance": Objective(MINIMIZE, lambda row: row.quality and row.quality.distance.value),
    "clip_score": Objective(
        MAXIMIZE,
        lambda row: None if not row.pretrained or not row.pretrained.clip_score else row.pretrained.clip_score.value,
        "quality.clip",
    ),
    "frechet": Objective(
        MINIMIZE,
        lambda row: None if not row.pretrained or not row.pretrained.frechet else row.pretrained.frechet.value,
        "quality.features",
    ),
}


def objective(name: str) -> Objective | None:
    """Return an objective by its name, or None if there is none; a plug-in's metric has no direction of its own."""
    if name.startswith(METRIC):
        return Objective("", lambda row: row.metrics.get(name.removeprefix(METRIC)), "quality.metrics")
    return OBJECTIVES.get(name)


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
    return Measured(folder, [float(value) for value in values if value is not None])
