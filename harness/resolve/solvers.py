"""Other solvers for a loaded run: those that a request may name in place of the configuration's."""

from __future__ import annotations

import warnings
from dataclasses import replace

from harness.config.schema import SolverConfig
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY
from harness.resolve.conflicts import check_conflicts
from harness.resolve.engines_table import NATIVE
from harness.resolve.plugin_rules import check_plugins
from harness.resolve.run import ResolvedRun
from schedulers.compatibility import resolve
from schedulers.tables import SOLVERS


def run_with_solver(run: ResolvedRun, solver: str, steps: int | None = None) -> ResolvedRun:
    """Return a run with another solver, whose options have their defaults.

    Path, spacing and prediction stay those of the run, so its grids and its loaded networks serve the other one too.

    Args:
        run: The resolved run.
        solver: The name of the solver; empty or the run's own for the run as it is.
        steps: The number of steps to check as well.

    Returns:
        The run with that solver.

    Raises:
        ValueError: It cannot run; one line says what to change.
    """
    config = run.config
    if solver in ("", config.scheduler.solver.name):
        return run
    if config.engine.name != NATIVE:
        raise ValueError(f"solver={solver}: engine={config.engine.name} has the one of its configuration; drop solver")
    if config.scheduler.family == PUBLISHED_FAMILY:
        raise ValueError(f"solver={solver}: scheduler=published has the checkpoint's own solver; drop solver")
    other = replace(config, scheduler=replace(config.scheduler, solver=SolverConfig(name=solver)))
    changed = ResolvedRun(other)
    settings = changed.noise_scheduler
    assert settings is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of options that only the run's own solver uses
        resolve(settings, steps)
    check_conflicts(other)
    check_plugins(other)
    return changed


def other_solvers(run: ResolvedRun) -> list[str]:
    """Return the names of all solvers that requests to a run may name, its own included."""
    own = run.config.scheduler
    if own.family == PUBLISHED_FAMILY:
        return []
    return [name for name in SOLVERS.names() if name == own.solver.name or _can_run(run, name)]


def _can_run(run: ResolvedRun, solver: str) -> bool:
    try:
        run_with_solver(run, solver)
    except ValueError:
        return False
    return True
