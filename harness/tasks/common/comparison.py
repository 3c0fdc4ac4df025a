"""What task=compare and task=load with two configurations share: the two runs, and the comparison's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from harness.config.schema import LaunchMode, RunConfig
from harness.config.tasks import TRAITS
from harness.loggers.wandb import mode_notes
from harness.metrics.difference import Difference
from harness.metrics.paired import Ratio, min_rounds
from harness.records.comparison import SCHEMA, Comparison, read_comparison
from harness.records.record import fingerprint, read_status
from harness.resolve.comparison import comparison_overrides, is_compared_key
from harness.resolve.compose import ConfigError, ResolvedRun, compose_run, to_dict


def comparison_runs(run: ResolvedRun) -> tuple[ResolvedRun, ResolvedRun]:
    """Resolve the two runs of a comparison, each checked like a single run.

    Args:
        run: The comparison.

    Returns:
        The runs a and b.

    Raises:
        ConfigError: There are too few rounds, or one of the two runs is invalid; the error names it.
    """
    config = run.config
    task = f"task={config.task.name.name}" + (" with a and b" if TRAITS[config.task.name].serves else "")
    if config.launch.mode is LaunchMode.inprocess:
        raise ConfigError(f"{task} keeps two engines warm, each in its own processes; use launch.mode=torchrun")
    if config.task.repeats < min_rounds():
        raise ConfigError(f"task.repeats={config.task.repeats}: {task} needs {min_rounds()} rounds or more")
    return _comparison_run(run, "a"), _comparison_run(run, "b")


def _comparison_run(comparison: ResolvedRun, name: str) -> ResolvedRun:
    own: list[str] = getattr(comparison.config.compare, name)
    try:
        run = compose_run(comparison_overrides(comparison.overrides, own, comparison.config), comparison.search)
    except ConfigError as error:
        raise ConfigError(f"compare.{name}={own}: {error}") from error
    return replace(run, folder=comparison.folder / name)


def make_comparison(
    run: ResolvedRun,
    pair: tuple[ResolvedRun, ResolvedRun],
    ratios: dict[str, Ratio],
    output: Difference | None = None,
    notes: Sequence[str] = (),
    verdicts: Mapping[str, str] = MappingProxyType({}),
) -> Comparison:
    """Build the comparison's record, with the ranks of both runs and the efficiency if b has more ranks.

    Args:
        run: The comparison.
        pair: The two runs of the comparison.
        ratios: Time ratio of a over b by what was timed.
        output: Difference of the last outputs, if it was measured.
        notes: Remarks for the record.
        verdicts: What the fidelity of a and of b means.

    Returns:
        The record of the comparison.
    """
    ranks_a, ranks_b = (each.world_size for each in pair)
    return Comparison(
        schema=SCHEMA,
        common=[override for override in run.overrides if not is_compared_key(override)],
        a=list(run.config.compare.a or ()),
        b=list(run.config.compare.b or ()),
        ranks=(ranks_a, ranks_b),
        ratios=ratios,
        efficiency={n: row.ratio * ranks_a / ranks_b for n, row in ratios.items()} if ranks_b > ranks_a else None,
        output=output,
        notes=[*notes, *mode_notes(run.config.logger.wandb.mode)],
        fingerprint=fingerprint(to_dict(run.config)),
        verdicts=dict(verdicts),
    )


def is_compared(folder: Path, config: RunConfig) -> bool:
    """Return whether the folder holds the finished comparison of this same configuration."""
    found = read_comparison(folder) if read_status(folder).state == "ok" else None
    if found is None:
        return False
    return (found.fingerprint, found.a, found.b) == (
        fingerprint(to_dict(config)),
        config.compare.a or [],
        config.compare.b or [],
    )
