"""task=compare: two configurations measured in alternation on warm engines, and the differences between them.

The order is A B, B A, A B ...: drift of the machine reaches both alike, and neither always goes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from harness.client.generator import DiffusionGenerator
from harness.config.schema import LaunchMode, RunConfig, Task
from harness.config.serve import Transport
from harness.loggers.table import print_comparison
from harness.loggers.wandb import log_comparison
from harness.metrics.difference import Difference, difference
from harness.metrics.paired import Ratio, min_rounds
from harness.parallel.mesh import degrees, world_size
from harness.records.comparison import FILE, SCHEMA, Comparison, read_comparison, time_ratios
from harness.records.record import RunFolder, Status, fingerprint, read_status
from harness.resolve.comparison import COMPARED, comparison_overrides, is_compared_key
from harness.resolve.compose import ConfigError, ResolvedRun, compose_run, to_dict, to_yaml
from harness.tasks.lifecycle import mirror, run_guarded
from harness.tasks.session import MeasurementSession, progress_bars


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
    task = f"task={config.task.name.name}" + (" with a and b" if config.task.name is Task.load else "")
    if config.launch.mode is LaunchMode.inprocess:
        raise ConfigError(f"{task} keeps two engines warm, each in its own processes; use launch.mode=torchrun")
    if config.task.name is Task.load and config.load.transport is not Transport.zmq:
        raise ConfigError("task=load with a and b loads two engines, not servers; drop load.transport=http")
    if config.task.repeats < min_rounds():
        raise ConfigError(f"task.repeats={config.task.repeats}: {task} needs {min_rounds()} rounds or more")
    return _comparison_run(run, "a"), _comparison_run(run, "b")


def _comparison_run(comparison: ResolvedRun, name: str) -> ResolvedRun:
    own: list[str] = getattr(comparison.config.compare, name)
    try:
        run = compose_run(comparison_overrides(comparison.overrides, own, comparison.config))
    except ConfigError as error:
        raise ConfigError(f"compare.{name}={own}: {error}") from error
    return ResolvedRun(run.config, run.overrides, comparison.folder / name, run.notes)


def execute_compare(
    run: ResolvedRun, pair: tuple[ResolvedRun, ResolvedRun], folder: RunFolder, console: Console
) -> Status:
    """Compare two runs in a claimed folder; any failure becomes the status.

    Args:
        run: The comparison.
        pair: The comparison's two runs, from `comparison_runs`.
        folder: The claimed folder.
        console: Console for the progress and the table.

    Returns:
        The status, which is on disk before anything is logged to wandb.
    """
    config = run.config
    status, comparison = run_guarded(
        run, folder, lambda: run_compare(run, pair, folder, console), lambda done: Status("ok")
    )
    if comparison is not None:
        mirror(lambda: log_comparison(config.logger.wandb, comparison, folder.path))
        if config.logger.table:
            print_comparison(comparison, folder.path, console)
    return status


def run_compare(
    run: ResolvedRun, pair: tuple[ResolvedRun, ResolvedRun], folder: RunFolder, console: Console
) -> Comparison:
    """Measure both runs in alternation; each has its own run folder, `a` or `b`, inside this one.

    Args:
        run: The comparison.
        pair: The comparison's two runs, from `comparison_runs`.
        folder: The claimed folder.
        console: Console for the progress.

    Returns:
        The comparison, which is on disk.

    Raises:
        RequestFailed: An engine answered with a typed error.
        EngineGone: A rank died, or was not ready in time.
    """
    folder.write_config(to_yaml(run.config))
    folders = [RunFolder.claim(each.folder) for each in pair]
    generators = [DiffusionGenerator.from_resolved(each, own.path) for each, own in zip(pair, folders, strict=True)]
    with progress_bars(console) as bars:
        sessions = [
            MeasurementSession(generator, bars, name) for generator, name in zip(generators, COMPARED, strict=True)
        ]
        try:
            for session in sessions:
                session.start()
            for session in sessions:
                session.warm_up()
            for number in range(run.config.task.repeats):
                for session in sessions if number % 2 == 0 else sessions[::-1]:
                    session.repeat()
            records = [session.record() for session in sessions]
        finally:
            for generator in generators:
                generator.stop()
    for session, record, own in zip(sessions, records, folders, strict=True):
        session.save(record, own)
        own.finish(Status("ok"))
    comparison = compare_sessions(run, pair, sessions)
    folder.write_json(FILE, comparison)
    return comparison


def compare_sessions(
    run: ResolvedRun, pair: tuple[ResolvedRun, ResolvedRun], sessions: Sequence[MeasurementSession]
) -> Comparison:
    """Compare the times and the outputs of two finished sessions.

    Args:
        run: The comparison.
        pair: The comparison's two runs.
        sessions: The finished sessions of a and b.

    Returns:
        The comparison. If the outputs cannot be compared, it has a note in place of their difference.
    """
    a, b = sessions
    output, notes = None, []
    try:
        output = difference(a.pixels, b.pixels, pixels=True)
    except ValueError as error:
        notes.append(f"the output difference is not measured: {error}")
    return make_comparison(run, pair, time_ratios(a.repeats, b.repeats), output, notes)


def make_comparison(
    run: ResolvedRun,
    pair: tuple[ResolvedRun, ResolvedRun],
    ratios: dict[str, Ratio],
    output: Difference | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Build the comparison's record, with the ranks of both runs and the efficiency if b has more ranks.

    Args:
        run: The comparison.
        pair: The comparison's two runs.
        ratios: Time ratio of a over b by what was timed.
        output: Difference of the last outputs, if it was measured.
        notes: Remarks for the record.

    Returns:
        The record of the comparison.
    """
    ranks_a, ranks_b = (world_size(degrees(each.config.parallel)) for each in pair)
    return Comparison(
        schema=SCHEMA,
        common=[override for override in run.overrides if not is_compared_key(override)],
        a=list(run.config.compare.a or ()),
        b=list(run.config.compare.b or ()),
        ranks=(ranks_a, ranks_b),
        ratios=ratios,
        efficiency={n: row.ratio * ranks_a / ranks_b for n, row in ratios.items()} if ranks_b > ranks_a else None,
        output=output,
        notes=list(notes),
        fingerprint=fingerprint(to_dict(run.config)),
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
