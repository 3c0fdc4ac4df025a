"""task=compare: two configurations drawn in alternation on engines that stay warm, and what differs between them.

A B, B A, A B ...: both see the same drift of the machine, and neither always goes first.
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
from harness.metrics.paired import Ratio, fewest_rounds
from harness.parallel.mesh import degrees, world_size
from harness.records.comparison import FILE, SCHEMA, Comparison, ratios_of, read_comparison
from harness.records.record import RunFolder, Status, fingerprint, read_status
from harness.resolve.comparison import SIDES, side_overrides
from harness.resolve.compose import ConfigError, ResolvedRun, compose_run, to_dict, to_yaml
from harness.tasks.lifecycle import ended, mirror
from harness.tasks.session import Series, progress_bars


def sides(composed: ResolvedRun) -> tuple[ResolvedRun, ResolvedRun]:
    """The two runs that are compared, each checked as a run of its own.

    Raises:
        ConfigError: too few rounds, or a side that cannot run, by its name.
    """
    config = composed.config
    task = f"task={config.task.name.name}" + (" with sides" if config.task.name is Task.load else "")
    if config.launch.mode is LaunchMode.inprocess:
        raise ConfigError(f"{task} keeps two engines warm, each in processes of its own; use launch.mode=torchrun")
    if config.task.name is Task.load and config.load.transport is not Transport.zmq:
        raise ConfigError("task=load with sides loads two engines, not servers; drop load.transport=http")
    if config.task.repeats < fewest_rounds():
        raise ConfigError(f"task.repeats={config.task.repeats}: {task} needs {fewest_rounds()} rounds or more")
    return _side(composed, "a"), _side(composed, "b")


def _side(composed: ResolvedRun, name: str) -> ResolvedRun:
    own: list[str] = getattr(composed.config, name)
    try:
        side = compose_run(side_overrides(composed.overrides, own, composed.config))
    except ConfigError as error:
        raise ConfigError(f"{name}={own}: {error}") from error
    return ResolvedRun(side.config, side.overrides, composed.folder / name, side.notes)


def compare_in(
    composed: ResolvedRun, pair: tuple[ResolvedRun, ResolvedRun], folder: RunFolder, console: Console
) -> Status:
    """Compares in a claimed folder, whatever happens: the status, which is on disk before anything is mirrored."""
    config = composed.config
    status, comparison = ended(
        composed, folder, lambda: run_compare(composed, pair, folder, console), lambda done: Status("ok")
    )
    if comparison is not None:
        mirror(lambda: log_comparison(config.logger.wandb, comparison, folder.path))
        if config.logger.table:
            print_comparison(comparison, folder.path, console)
    return status


def run_compare(
    composed: ResolvedRun, pair: tuple[ResolvedRun, ResolvedRun], folder: RunFolder, console: Console
) -> Comparison:
    """Draws both sides in alternation; either's row is a run's folder of its own, `a` and `b`, in this one.

    Raises:
        RequestFailed: an engine's typed answer.
        EngineGone: a rank died, or was not ready in time.
    """
    folder.write_config(to_yaml(composed.config))
    folders = [RunFolder.claim(side.folder) for side in pair]
    generators = [DiffusionGenerator.from_resolved(side, own.path) for side, own in zip(pair, folders, strict=True)]
    with progress_bars(console) as bars:
        both = [Series(generator, bars, name) for generator, name in zip(generators, SIDES, strict=True)]
        try:
            for series in both:
                series.start()
            for series in both:
                series.warm_up()
            for number in range(composed.config.task.repeats):
                for series in both if number % 2 == 0 else both[::-1]:
                    series.repeat()
            records = [series.record() for series in both]
        finally:
            for generator in generators:
                generator.stop()
    for series, record, own in zip(both, records, folders, strict=True):
        series.save(record, own)
        own.finish(Status("ok"))
    comparison = compared(composed, pair, both)
    folder.write_json(FILE, comparison)
    return comparison


def compared(composed: ResolvedRun, pair: tuple[ResolvedRun, ResolvedRun], both: Sequence[Series]) -> Comparison:
    """What two finished series say of one another."""
    a, b = both
    output, notes = None, []
    try:
        output = difference(a.pixels, b.pixels, pixels=True)
    except ValueError as error:
        notes.append(f"the output difference is not measured: {error}")
    return stated(composed, pair, ratios_of(a.repeats, b.repeats), output, notes)


def stated(
    composed: ResolvedRun,
    pair: tuple[ResolvedRun, ResolvedRun],
    ratios: dict[str, Ratio],
    output: Difference | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """A comparison with its two sides, their ranks and the efficiency of more."""
    ranks_a, ranks_b = (world_size(degrees(side.config.parallel)) for side in pair)
    return Comparison(
        schema=SCHEMA,
        common=[override for override in composed.overrides if override.partition("=")[0] not in SIDES],
        a=list(composed.config.a or ()),
        b=list(composed.config.b or ()),
        ranks=(ranks_a, ranks_b),
        ratios=ratios,
        efficiency={n: row.ratio * ranks_a / ranks_b for n, row in ratios.items()} if ranks_b > ranks_a else None,
        output=output,
        notes=list(notes),
        fingerprint=fingerprint(to_dict(composed.config)),
    )


def is_compared(folder: Path, config: RunConfig) -> bool:
    """Whether this very comparison is in a folder."""
    found = read_comparison(folder) if read_status(folder).state == "ok" else None
    if found is None:
        return False
    return (found.fingerprint, found.a, found.b) == (fingerprint(to_dict(config)), config.a or [], config.b or [])
