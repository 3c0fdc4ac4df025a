"""task=generate and bench: start ranks, generate, save, record and log; any failure becomes the status."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import msgspec
from rich.console import Console

from harness.client.generator import DiffusionGenerator
from harness.engines.pool import MakeEngine, new_engine
from harness.loggers.table import print_record
from harness.loggers.wandb import log_run, mode_notes
from harness.metrics.fidelity import BROKEN
from harness.records.record import Record, RunFolder, Status
from harness.records.rerun import with_rerun
from harness.resolve.compose import ResolvedRun
from harness.tasks.common.fidelity import measure_fidelity
from harness.tasks.common.imports import import_in_background, modules_for_saving
from harness.tasks.common.lifecycle import claim, guarded, mirror
from harness.tasks.common.progress import progress_bars
from harness.tasks.common.references import ReferenceRenderer
from harness.tasks.common.session import MeasurementSession
from harness.tasks.common.stream import stream


def check(run: ResolvedRun) -> None:
    """Accept the run: what can be refused of it, every task refuses alike."""


def execute(
    run: ResolvedRun, console: Console, engines: MakeEngine = new_engine, folder: RunFolder | None = None
) -> Status:
    """Generate, save the images, write the record and log it; any failure becomes the status.

    Afterwards the ranks have ended, or are back in their pool.

    Args:
        run: The resolved run.
        console: Console for the progress and the table.
        engines: Function that returns the run's engine, new or still warm from an earlier job.
        folder: The claimed folder; None claims the run's own.

    Returns:
        The status, which is on disk before anything is logged to wandb.

    Raises:
        RunFolderError: Another run is in the folder.
    """
    config, record = run.config, None
    folder = claim(run) if folder is None else folder
    if run.dataset is not None:
        return stream(run, run.dataset, console, engines, folder)
    with guarded(run, folder) as outcome, progress_bars(console, config.logger.progress) as bars:
        run = replace(run, notes=[*run.notes, *mode_notes(config.logger.wandb.mode)])
        generator = DiffusionGenerator.from_resolved(run, folder.path, engines)
        session = MeasurementSession(generator, bars)
        try:
            with import_in_background(modules_for_saving(config)):
                session.start()
            session.warm_up()
            for _ in range(config.task.repeats):
                session.repeat()
            if config.task.profile:
                session.profile()
            if config.task.trace:
                session.trace()
            images = session.save_images(folder)  # first what the user requested; all else can wait
            measured = msgspec.structs.replace(session.record(), samples=images)
        finally:
            generator.stop()
        folder.write_record(measured)  # whatever becomes of the trace and the references
        measured = session.save_trace(measured, folder)
        measured = add_fidelity(run, session, measured, ReferenceRenderer(folder.path, bars, engines))
        measured = with_rerun(measured, config.rerun_of)
        folder.write_record(measured)
        record, outcome.status = measured, status_from_fidelity(measured)
    if record is not None:
        if config.logger.table:
            print_record(record, folder.path, console)
        mirror(partial(log_run, config.logger.wandb, record, folder.path, config.task.name.name, outcome.status))
    return outcome.status


def status_from_fidelity(record: Record) -> Status:
    """Return the status of a finished run: failed if its error is larger than its method claims."""
    row = record.fidelity
    if row is None or row.verdict != BROKEN:
        return Status("ok")
    used = f" ({', '.join(row.methods)})" if row.methods else ""
    failed = [
        f"{check.name} is {check.error:.2g} from {check.against}, where {check.bound:.2g} passes"
        for check in row.broken
    ]
    if not failed:  # an exact method may not differ in a single bit
        failed = [f"the error is {row.latent.rel_l2:.2g} at the latent and {row.pixel.rel_l2:.2g} at the pixel"]
    return Status("failed", f"broken: declared {row.method_class}{used}, but {'; '.join(failed)}")


def add_fidelity(run: ResolvedRun, session: MeasurementSession, record: Record, renderer: ReferenceRenderer) -> Record:
    """Return the record of a finished session with its fidelity, if the task measures that.

    Args:
        run: The resolved run.
        session: The finished session.
        record: The session's record.
        renderer: Generator of references that are not kept yet.

    Returns:
        The record.
    """
    if not run.config.task.fidelity or session.outputs is None:
        return record
    found, notes = measure_fidelity(run, session.outputs, renderer)
    return msgspec.structs.replace(record, fidelity=found, notes=[*record.notes, *notes])
