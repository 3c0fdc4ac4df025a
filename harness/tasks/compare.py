"""task=compare: two configurations measured in alternation on warm engines, and the differences between them.

The order is A B, B A, A B ...: drift of the machine reaches both alike, and neither always goes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from rich.console import Console

from harness.client.build_record import machine_notes
from harness.client.generator import DiffusionGenerator
from harness.config.yaml import to_dict
from harness.engines.pool import MakeEngine, new_engine
from harness.loggers.table import print_comparison
from harness.loggers.wandb import log_comparison
from harness.metrics.difference import difference
from harness.records.comparison import FILE, Comparison, time_ratios
from harness.records.record import RunFolder, Status
from harness.resolve.comparison import COMPARED
from harness.resolve.compose import ConfigError, ResolvedRun, to_yaml
from harness.tasks.common.comparison import comparison_runs, make_comparison
from harness.tasks.common.lifecycle import guarded, mirror
from harness.tasks.common.measure import add_fidelity, status_from_fidelity
from harness.tasks.common.progress import progress_bars
from harness.tasks.common.references import ReferenceRenderer
from harness.tasks.common.session import MeasurementSession


def check(run: ResolvedRun) -> None:
    """Refuse a comparison that lacks a configuration.

    Raises:
        ConfigError: One is missing; the message says what to add.
    """
    given = {name: getattr(run.config.compare, name) for name in COMPARED}
    if missing := [name for name, overrides in given.items() if overrides is None]:
        raise ConfigError(
            f"task=compare needs two configurations; add {' '.join(f'compare.{n}=[...]' for n in missing)}, lists "
            "of overrides such as compare.b='[parallel=ulysses2]' ([] changes nothing)"
        )


def execute(run: ResolvedRun, console: Console, engines: MakeEngine = new_engine) -> Status:
    """Compare two runs; any failure becomes the status.

    Args:
        run: The comparison.
        console: Console for the progress and the table.
        engines: Not used; both engines of a comparison are its own.

    Returns:
        The status, which is on disk before anything is logged to wandb.

    Raises:
        RunFolderError: Another run is in the folder.
        ConfigError: One of the two runs is invalid; no folder was claimed.
    """
    config, comparison = run.config, None
    pair = comparison_runs(run)
    folder = RunFolder.claim(run.folder, run.retry)
    with guarded(run, folder) as outcome:
        comparison, outcome.status = run_compare(run, pair, folder, console)
    if comparison is not None:
        mirror(partial(log_comparison, config.logger.wandb, comparison, folder.path, to_dict(config), outcome.status))
        if config.logger.table:
            print_comparison(comparison, folder.path, console)
    return outcome.status


def run_compare(
    run: ResolvedRun, pair: tuple[ResolvedRun, ResolvedRun], folder: RunFolder, console: Console
) -> tuple[Comparison, Status]:
    """Measure both runs in alternation; each has its own run folder, `a` or `b`, inside this one.

    Args:
        run: The comparison.
        pair: The comparison's two runs, from `comparison_runs`.
        folder: The claimed folder.
        console: Console for the progress.

    Returns:
        The comparison, which is on disk; and its status, failed if the images of a run miss what its methods claim.

    Raises:
        RequestFailed: An engine answered with a typed error.
        EngineGone: A rank died, or was not ready in time.
    """
    folder.write_config(to_yaml(run.config))
    folders = [RunFolder.claim(each.folder) for each in pair]
    generators = [DiffusionGenerator.from_resolved(each, own.path) for each, own in zip(pair, folders, strict=True)]
    with progress_bars(console, run.config.logger.progress) as bars:
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
            session.save(record, own)  # whatever becomes of the references
        statuses: dict[str, Status] = {}
        verdicts: dict[str, str] = {}
        for name, each, session, record, own in zip(COMPARED, pair, sessions, records, folders, strict=True):
            checked = add_fidelity(each, session, record, ReferenceRenderer(own.path, bars))
            session.save(checked, own)
            statuses[name] = status_from_fidelity(checked)
            own.finish(statuses[name])
            if checked.fidelity is not None:
                verdicts[name] = checked.fidelity.verdict
    comparison = compare_sessions(run, pair, sessions, verdicts)
    folder.write_json(FILE, comparison)
    failed = [f"{name} is {status.error}" for name, status in statuses.items() if status.state != "ok"]
    return comparison, Status("failed", "; ".join(failed)) if failed else Status("ok")


def compare_sessions(
    run: ResolvedRun,
    pair: tuple[ResolvedRun, ResolvedRun],
    sessions: Sequence[MeasurementSession],
    verdicts: Mapping[str, str],
) -> Comparison:
    """Compare the times and the outputs of two finished sessions.

    Args:
        run: The comparison.
        pair: The comparison's two runs.
        sessions: The finished sessions of a and b.
        verdicts: What the fidelity of a and of b means.

    Returns:
        The comparison. If the outputs cannot be compared, it has a note in place of their difference.
    """
    a, b = sessions
    output, notes = None, machine_notes([*a.repeats, *b.repeats])
    try:
        output = difference(a.pixels, b.pixels, pixels=True)
    except ValueError as error:
        notes.append(f"the output difference is not measured: {error}")
    return make_comparison(run, pair, time_ratios(a.repeats, b.repeats), output, notes, verdicts)
