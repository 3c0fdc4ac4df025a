"""The tasks: start ranks, draw, save, record, mirror; whatever happens, the status says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness.client import DiffusionGenerator, Generation
from harness.compose import Composed, to_dict, to_yaml
from harness.config.schema import RunConfig
from harness.engine import RequestFailed
from harness.loggers.table import print_record
from harness.loggers.training import Bars, LogLines, WandbCurve, Watchers
from harness.loggers.wandb import log_failure, log_run
from harness.messages import EngineInfo, GenerationResult
from harness.messages import Progress as StepProgress
from harness.pipeline.settings import noise_scheduler_settings
from harness.records import STATES, Record, Repeat, RunFolder, RunFolderError, Status
from harness.results import measured
from harness.serving.faults import failure_kind, failure_line
from harness.serving.transport import EngineGone
from harness.terminal import complain


def run_in(composed: Composed, folder: RunFolder, console: Console, make: Callable[[], DiffusionGenerator]) -> Status:
    """Draws in a claimed folder, whatever happens: the status, which is on disk before anything is mirrored.

    Args:
        composed: what to draw.
        folder: the claimed folder.
        console: where the progress and the table go.
        make: makes the generator.
    """
    config = composed.config
    try:
        record = run_generate(composed, folder, make(), console)
    except (Exception, KeyboardInterrupt) as error:
        status = status_of(error)
        folder.finish(status)
        complain(f"{status.state}: {status.error} (see {folder.path})")
        if status.state != "cancelled":
            mirror(
                lambda: log_failure(config.logger.wandb, to_dict(config), folder.path, config.task.name.name, status)
            )
        return status
    folder.finish(Status("ok"))
    mirror(lambda: log_run(config.logger.wandb, record, folder.path, config.task.name.name))
    if config.logger.table:
        print_record(record, folder.path, console)
    return Status("ok")


def refuse(folder: Path, error: Exception) -> Status:
    """Ends a run that was never started: one line, and a status in the folder it would have had."""
    complain(error)
    status = Status("failed", str(error))
    with suppress(RunFolderError):
        RunFolder.claim(folder).finish(status)
    return status


def run_generate(composed: Composed, folder: RunFolder, generator: DiffusionGenerator, console: Console) -> Record:
    """One run in a claimed folder: the record, after it is on disk; the ranks have ended.

    Raises:
        RequestFailed: the engine's typed answer.
        EngineGone: a rank died, or was not ready in time.
    """
    config = composed.config
    repeats: list[Repeat] = []
    results: list[GenerationResult] = []
    with _bars(console) as bars:
        try:
            _start(generator, bars)
            warmup_ms = [_draw(generator, bars, "warming up").client_ms for _ in range(config.task.warmup)]
            for number in range(config.task.repeats):
                last = _draw(generator, bars, f"drawing {number + 1} of {config.task.repeats}")
                repeats.append(measured(last.result, last.client_ms))
                results.append(last.result)
            record = generator.record(config.request, repeats, results, warmup_ms, last.pixels)
        finally:
            generator.stop()
    record = msgspec.structs.replace(record, samples=last.save(folder.path, record.fingerprint))
    folder.write_record(record)
    return record


def run_training(config: RunConfig, console: Console) -> Status:
    """Trains the family of group `scheduler`; a run found in its folder is resumed. The status, which is on disk too.

    Args:
        config: the whole configuration, composed.
        console: where the bars go; without a terminal there are log lines.
    """
    Path(config.train.folder).mkdir(parents=True, exist_ok=True)
    folder = RunFolder(Path(config.train.folder))
    folder.write_config(to_yaml(config))
    folder.finish(Status("failed", "the run was cut off before it ended"))
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
    from harness.train.run import run

    settings = noise_scheduler_settings(config.scheduler)
    if console.is_terminal:
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console)])
        with Bars(console) as bars:
            run(config.train, settings, Watchers([bars, curve]))
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        run(config.train, settings, Watchers([LogLines(), curve]))


def status_of(error: BaseException) -> Status:
    """The state and the one line that an exception means."""
    if isinstance(error, KeyboardInterrupt):
        return Status("cancelled", "interrupted")
    if isinstance(error, RequestFailed | EngineGone):
        return Status(error.kind if error.kind in STATES else "failed", str(error).splitlines()[0])
    return Status(failure_kind(error), failure_line(error))


def mirror(log: Callable[[], None]) -> bool:
    """Logs a run elsewhere; what goes wrong there is said, and is not the run's failure. Whether it went well."""
    try:
        log()
    except Exception as error:
        complain(f"the run is on disk, but wandb did not take it: {status_of(error).error}")
        return False
    return True


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield bars


def _start(generator: DiffusionGenerator, bars: Progress) -> None:
    task = bars.add_task("starting ranks", total=None)

    def on_wait(info: EngineInfo | None) -> None:
        bars.update(task, description="starting ranks" if info is None else f"{info.state} on {info.world_size} ranks")

    generator.start(on_wait)
    bars.remove_task(task)


def _draw(generator: DiffusionGenerator, bars: Progress, label: str) -> Generation:
    task = bars.add_task(label, total=None)

    def on_progress(progress: StepProgress) -> None:
        stage = progress.stage.replace("_", " ")
        bars.update(task, description=f"{label}: {stage}", completed=progress.done, total=progress.total or None)

    generation = generator.generate(on_progress=on_progress)
    bars.remove_task(task)
    return generation
