"""task=generate, bench and train: start ranks, generate, save, record and log; any failure becomes the status."""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from rich.console import Console
from rich.logging import RichHandler

from harness.client.generator import DiffusionGenerator
from harness.config.schema import RunConfig
from harness.engines.pool import MakeEngine, new_engine
from harness.loggers.table import print_record
from harness.loggers.training import LogCallback, ProgressCallback, TrainingCallbacks, WandbCallback
from harness.loggers.wandb import log_run, resolve_mode
from harness.metrics.fidelity import BROKEN
from harness.records.record import INTERRUPTED, Record, RunFolder, Status
from harness.resolve.compose import ResolvedRun, to_dict, to_yaml
from harness.resolve.scheduler import noise_scheduler_settings
from harness.tasks.fidelity import GeneratedOutput, ReferenceRenderer, measure_fidelity
from harness.tasks.lifecycle import mirror, run_guarded, status_from_error
from harness.tasks.session import MeasurementSession, progress_bars
from harness.tasks.terminal import print_error


def execute_generate(
    run: ResolvedRun, folder: RunFolder, console: Console, make_engine: MakeEngine = new_engine
) -> Status:
    """Generate in a claimed folder; any failure becomes the status.

    Args:
        run: The resolved run.
        folder: The claimed folder.
        console: Console for the progress and the table.
        make_engine: Function that returns the run's engine, new or still warm from an earlier job.

    Returns:
        The status, which is on disk before anything is logged to wandb.
    """
    config = run.config

    def work() -> Record:
        return run_generate(run, folder, console, make_engine)

    outcome = run_guarded(run, folder, work, status_from_fidelity)
    status, record = outcome
    if record is not None:
        if config.logger.table:
            print_record(record, folder.path, console)
        mirror(lambda: log_run(config.logger.wandb, record, folder.path, config.task.name.name))
    return status


def status_from_fidelity(record: Record) -> Status:
    """Return the status of a finished run: failed if its error is larger than its method claims."""
    row = record.fidelity
    if row is None or row.verdict != BROKEN:
        return Status("ok")
    used = f" ({', '.join(row.methods)})" if row.methods else ""
    return Status(
        "failed",
        f"broken: declared {row.method_class}{used}, but the error is {row.latent.rel_l2:.2g} at the latent and "
        f"{row.pixel.rel_l2:.2g} at the pixel, where rounding alone makes {row.floor_latent:.2g} and "
        f"{row.floor_pixel:.2g}",
    )


def run_generate(run: ResolvedRun, folder: RunFolder, console: Console, make_engine: MakeEngine) -> Record:
    """Generate, save the images and write the record; afterwards the ranks have ended or are back in their pool.

    Args:
        run: The resolved run.
        folder: The claimed folder.
        console: Console for the progress.
        make_engine: Function that returns the run's engine, new or still warm from an earlier job.

    Returns:
        The record, which is on disk.

    Raises:
        RequestFailed: The engine answered with a typed error.
        EngineGone: A rank died, or was not ready in time.
    """
    generator = DiffusionGenerator.from_resolved(run, folder.path, make_engine)
    with progress_bars(console) as bars:
        session = MeasurementSession(generator, bars)
        try:
            with import_in_background(modules_for_saving(run.config)):
                session.start()
            session.warm_up()
            for _ in range(run.config.task.repeats):
                session.repeat()
            if run.config.task.profile:
                session.profile()
            images = session.save_images(folder)  # first what the user requested; all else can wait
            record = msgspec.structs.replace(session.record(), samples=images)
        finally:
            generator.stop()
        if run.config.task.fidelity:
            output = GeneratedOutput(session.last.latents, session.pixels)
            found, notes = measure_fidelity(run.config, output, ReferenceRenderer(folder.path, bars, make_engine))
            record = msgspec.structs.replace(record, fidelity=found, notes=[*record.notes, *notes])
    folder.write_record(record)
    return record


def modules_for_saving(config: RunConfig) -> list[str]:
    """Return the modules that saving the images and logging the run will import."""
    mirrored = resolve_mode(config.logger.wandb.mode) != "disabled"
    return ["PIL.ImageDraw", "PIL.ImageFont", "PIL.PngImagePlugin", *(["wandb"] if mirrored else [])]


@contextmanager
def import_in_background(names: Sequence[str]) -> Iterator[None]:
    """Import modules in a thread while the block waits for other processes, so that nothing waits for them later.

    The thread has finished when the block is left, before anything is timed. A module that cannot be imported raises
    its error where it is used.

    Args:
        names: Modules to import.
    """

    def work() -> None:
        for name in names:
            with suppress(ImportError):
                importlib.import_module(name)

    thread = threading.Thread(target=work, name="imports")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def run_training(config: RunConfig, console: Console) -> Status:
    """Train the family of config group `scheduler`; a training found in the folder is resumed.

    Args:
        config: The whole resolved configuration.
        console: Console for the progress bars; if it is no terminal, there are log lines.

    Returns:
        The status, which is on disk.
    """
    Path(config.train.folder).mkdir(parents=True, exist_ok=True)
    folder = RunFolder(Path(config.train.folder))
    folder.write_config(to_yaml(config))
    folder.finish(INTERRUPTED)
    curve = WandbCallback(config.logger.wandb, to_dict(config), folder.path, config.scheduler.family, mirror)
    try:
        _train(config, console, curve)
        status = Status("ok")
    except (Exception, KeyboardInterrupt) as error:
        status = status_from_error(error)
        if isinstance(error, ModuleNotFoundError):
            status = Status("failed", f"training needs the package {error.name}: pip install 'triptych[train]'")
        print_error(f"{status.state}: {status.error} (what was trained so far is in {folder.path})")
    folder.finish(status)
    curve.finish(status)
    return status


def _train(config: RunConfig, console: Console, curve: WandbCallback) -> None:
    from harness.tasks.train.run import run

    settings = noise_scheduler_settings(config.scheduler)
    if console.is_terminal:
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console)])
        with ProgressCallback(console) as bars:
            run(config.train, settings, TrainingCallbacks([bars, curve]))
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        run(config.train, settings, TrainingCallbacks([LogCallback(), curve]))
