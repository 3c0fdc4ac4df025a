"""The tasks: start ranks, draw, save, record, mirror; whatever happens, the status says so."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from hydra.errors import HydraException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness.client import DiffusionGenerator, Generation
from harness.compose import Composed, ConfigError, run_folder, to_dict
from harness.config.train import TrainConfig
from harness.engine import RequestFailed
from harness.messages import EngineInfo
from harness.messages import Progress as StepProgress
from harness.records import STATES, Record, RunFolder, RunFolderError, Status
from harness.results import measured
from harness.serving.transport import EngineGone
from harness.terminal import EXIT_BAD_INPUT, complain


def run_in(composed: Composed, folder: RunFolder, console: Console, generator: DiffusionGenerator) -> Status:
    """Draws in a claimed folder, whatever happens: the status, which is on disk too."""
    try:
        record = run_generate(composed, folder, generator, console)
        finish_ok(composed, folder, record, console)
        return Status("ok")
    except (Exception, KeyboardInterrupt) as error:
        status = finish_failed(composed, folder, error)
        complain(f"{status.state}: {status.error} (see {folder.path})")
        return status


def refuse(overrides: Sequence[str], error: ConfigError) -> int:
    """Ends a run that was never started: one line, a status in the folder it would have had, and the exit status."""
    complain(error)
    with suppress(RunFolderError, HydraException):
        RunFolder.claim(run_folder(overrides)).finish(Status("failed", str(error)))
    return EXIT_BAD_INPUT


def run_generate(composed: Composed, folder: RunFolder, generator: DiffusionGenerator, console: Console) -> Record:
    """One run in a claimed folder: the record, after it is on disk.

    Raises:
        RequestFailed, EngineGone: what went wrong; `finish_failed` turns it into a status.
    """
    config = composed.config
    with _bars(console) as bars, generator:
        _start(generator, bars)
        warmup_ms = []
        for number in range(config.task.warmup if config.task.repeats > 1 else 0):
            warmup_ms.append(_draw(generator, bars, f"warm-up {number + 1}").client_ms)
        runs: list[Generation] = []
        for number in range(config.task.repeats):
            label = "drawing" if config.task.repeats == 1 else f"repeat {number + 1} of {config.task.repeats}"
            runs.append(_draw(generator, bars, label))
        repeats = [measured(run.result, run.client_ms) for run in runs]
        record = generator.record(config.request, repeats, [run.result for run in runs], warmup_ms)
    rows = runs[-1].save(folder.path, record.fingerprint)
    record = msgspec.structs.replace(record, samples=rows)
    folder.write_record(record)
    return record


def finish_ok(composed: Composed, folder: RunFolder, record: Record, console: Console) -> None:
    """Mirrors a finished run, prints its table, and writes status ok."""
    from harness.loggers.table import print_record
    from harness.loggers.wandb import log_run

    logger = composed.config.logger
    log_run(logger.wandb, record, folder.path, composed.config.task.name.name)
    folder.finish(Status("ok"))
    if logger.table:
        print_record(record, folder.path, console)


def finish_failed(composed: Composed, folder: RunFolder, error: BaseException) -> Status:
    """Writes the status of a run that did not end well, and mirrors it."""
    status = status_of(error)
    folder.finish(status)
    if status.state != "cancelled":
        from harness.loggers.wandb import log_failure

        config = composed.config
        log_failure(config.logger.wandb, to_dict(config), folder.path, config.task.name.name, status.error or "")
    return status


def status_of(error: BaseException) -> Status:
    """The state and the one line that an exception means."""
    line = (str(error).splitlines() or [""])[0] or type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return Status("cancelled", "interrupted")
    if isinstance(error, RequestFailed):
        return Status(error.kind if error.kind in STATES else "failed", line)
    if isinstance(error, EngineGone | ValueError):
        return Status("failed", line)
    return Status("failed", f"{type(error).__name__}: {line}")


def run_training(config: TrainConfig) -> Status:
    """Trains the reference model; a run found in its folder is resumed. The status, which is on disk too."""
    from harness.train.run import run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    Path(config.folder).mkdir(parents=True, exist_ok=True)
    folder = RunFolder(Path(config.folder))
    try:
        run(config)
        status = Status("ok")
    except (Exception, KeyboardInterrupt) as error:
        status = status_of(error)
        complain(f"{status.state}: {status.error} (what is trained so far is in {folder.path})")
    folder.finish(status)
    return status


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield bars


def _start(generator: DiffusionGenerator, bars: Progress) -> None:
    task = bars.add_task("starting ranks", total=None)

    def on_wait(info: EngineInfo | None) -> None:
        bars.update(task, description="starting ranks" if info is None else f"{info.state} on {info.world_size} ranks")

    if generator.info is None:
        generator.start(on_wait)
    bars.remove_task(task)


def _draw(generator: DiffusionGenerator, bars: Progress, label: str) -> Generation:
    task = bars.add_task(label, total=None)

    def on_progress(progress: StepProgress) -> None:
        bars.update(task, completed=progress.done, total=progress.total)

    generation = generator.generate(on_progress=on_progress)
    bars.remove_task(task)
    return generation
