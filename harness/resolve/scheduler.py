"""The `scheduler` group as settings of the schedulers package; a launcher can check it without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from harness.config.schema import SchedulerConfig, SolverConfig
from harness.plugins import arguments_of
from schedulers.registry import plugin_options
from schedulers.settings import NoiseSchedulerSettings


def noise_scheduler_settings(
    config: SchedulerConfig, plugin: Mapping[str, object] | None = None
) -> NoiseSchedulerSettings:
    """Return the group as the schedulers package's settings; null stays the family's default.

    Args:
        config: The `scheduler` group.
        plugin: The `plugin` group, which has the options of registered solvers, paths and spacings.
    """
    plain: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(SchedulerConfig) if f.name != "solver"}
    options: dict[str, Any] = {f.name: getattr(config.solver, f.name) for f in fields(SolverConfig) if f.name != "name"}
    own = {name: arguments_of(plugin or {}, name) for name in plugin_options()}
    return NoiseSchedulerSettings(solver=config.solver.name, plugin=own, **options, **plain)
