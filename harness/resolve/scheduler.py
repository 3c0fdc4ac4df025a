"""The `scheduler` group as settings of the schedulers package; a launcher can check it without torch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from harness.config.schema import SchedulerConfig, SolverConfig
from schedulers.settings import NoiseSchedulerSettings


def noise_scheduler_settings(config: SchedulerConfig) -> NoiseSchedulerSettings:
    """Return the group as the schedulers package's settings; null stays the family's default."""
    plain: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(SchedulerConfig) if f.name != "solver"}
    options: dict[str, Any] = {f.name: getattr(config.solver, f.name) for f in fields(SolverConfig) if f.name != "name"}
    return NoiseSchedulerSettings(solver=config.solver.name, **options, **plain)
