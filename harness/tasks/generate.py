"""The tasks: start ranks, draw, save, record, mirror; whatever happens, the status says so."""

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
from harness.loggers.training import Bars, LogLines, WandbCurve, Watchers
from harness.loggers.wandb import log_run, resolve_mode
from harness.metrics.fidelity import BROKEN
from harness.records.record import CUT_OFF, Record, RunFolder, Status
from harness.resolve.compose import ResolvedRun, to_dict, to_yaml
from harness.resolve.scheduler import noise_scheduler_settings
from harness.tasks.fidelity import Artist, Drawn, measure
from harness.tasks.lifecycle import ended, mirror, status_of
from harness.tasks.session import Series, progress_bars
from harness.tasks.terminal import complain


def run_in(composed: ResolvedRun, folder: RunFolder, console: Console, make_engine: MakeEngine = new_engine) -> Status:
    """Draws in a claimed folder, whatever happens: the status, which is on disk before anything is mirrored.

    Args:
        composed: what to draw.
        folder: the claimed folder.
        console: where the progress and the table go.
        make_engine: makes its engine, or finds one that is warm.
    """
    config = composed.config

    def work() -> Record:
        return run_generate(composed, folder, console, make_engine)

    outcome = ended(composed, folder, work, judged)
    status, record = outcome
    if record is not None:
        if config.logger.table:
            print_record(record, folder.path, console)
        mirror(lambda: log_run(config.logger.wandb, record, folder.path, config.task.name.name))
    return status


def judged(record: Record) -> Status:
    """A run whose method keeps less than it claims has failed, with its record on disk."""
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


def run_generate(composed: ResolvedRun, folder: RunFolder, console: Console, make_engine: MakeEngine) -> Record:
    """One run in a claimed folder: the record, after it is on disk; the ranks have ended, or are their pool's.

    Raises:
        RequestFailed: the engine's typed answer.
        EngineGone: a rank died, or was not ready in time.
    """
    generator = DiffusionGenerator.from_resolved(composed, folder.path, make_engine)
    with progress_bars(console) as bars:
        series = Series(generator, bars)
        try:
            with imported_meanwhile(imports(composed.config)):
                series.start()
            series.warm_up()
            for _ in range(composed.config.task.repeats):
                series.repeat()
            if composed.config.task.profile:
                series.profile()
            pictures = series.save_pictures(folder)  # what was asked for, before anything that can wait
            record = msgspec.structs.replace(series.record(), samples=pictures)
        finally:
            generator.stop()
        if composed.config.task.fidelity:
            row = Drawn(series.last.latents, series.pixels)
            found, notes = measure(composed.config, row, Artist(folder.path, bars, make_engine))
            record = msgspec.structs.replace(record, fidelity=found, notes=[*record.notes, *notes])
    folder.write_record(record)
    return record


def imports(config: RunConfig) -> list[str]:
    """What saving and mirroring the pictures of a run will import."""
    mirrored = resolve_mode(config.logger.wandb.mode) != "disabled"
    return ["PIL.ImageDraw", "PIL.ImageFont", "PIL.PngImagePlugin", *(["wandb"] if mirrored else [])]


@contextmanager
def imported_meanwhile(names: Sequence[str]) -> Iterator[None]:
    """Imports modules while the block waits for other processes, so that nothing waits for them later; it is done when
    the block is left, before anything is timed. What cannot be imported is said where it is used.
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
    """Trains the family of group `scheduler`; a run found in its folder is resumed. The status, which is on disk too.

    Args:
        config: the whole configuration, composed.
        console: where the bars go; without a terminal there are log lines.
    """
    Path(config.train.folder).mkdir(parents=True, exist_ok=True)
    folder = RunFolder(Path(config.train.folder))
    folder.write_config(to_yaml(config))
    folder.finish(CUT_OFF)
    curve = WandbCurve(config.logger.wandb, to_dict(config), folder.path, config.scheduler.family, mirror)
    try:
        _train(config, console, curve)
        status = Status("ok")
    except (Exception, KeyboardInterrupt) as error:
        status = status_of(error)
        if isinstance(error, ModuleNotFoundError):
            status = Status("failed", f"training needs the package {error.name}: pip install 'triptych[train]'")
        complain(f"{status.state}: {status.error} (what is trained so far is in {folder.path})")
    folder.finish(status)
    curve.finish(status)
    return status


def _train(config: RunConfig, console: Console, curve: WandbCurve) -> None:
    from harness.tasks.train.run import run

    settings = noise_scheduler_settings(config.scheduler)
    if console.is_terminal:
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console)])
        with Bars(console) as bars:
            run(config.train, settings, Watchers([bars, curve]))
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        run(config.train, settings, Watchers([LogLines(), curve]))
