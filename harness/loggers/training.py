"""Callbacks of a training: the terminal's progress bar or log lines, and a wandb run that a restart resumes."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from harness.config.schema import WandbConfig
from harness.loggers.declared import used_config
from harness.loggers.wandb import connected_mode, open_run
from harness.records.record import Status, write_atomically

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LossCurvePoint:
    """One point of the loss curve; the loss is the mean since the point before."""

    part: str
    step: int
    images: int
    loss: float
    lr: float
    images_per_s: float
    elapsed_s: float


class TrainingCallback:
    """A callback of an optimization; a subclass overrides the events that it needs."""

    def begin(self, part: str, step: int, steps: int) -> None:
        """Handle the start of the optimization ``part``, or its resumption, after ``step`` of ``steps`` updates."""

    def step(self, part: str, step: int) -> None:
        """Handle the end of update number ``step``."""

    def line(self, line: LossCurvePoint) -> None:
        """Handle a point of the loss curve."""

    def sheet(self, part: str, images: int, path: Path) -> None:
        """Handle a sheet of samples on disk, generated after ``images`` images."""


class TrainingCallbacks(TrainingCallback):
    """Several callbacks as one."""

    def __init__(self, callbacks: Sequence[TrainingCallback]) -> None:
        self.callbacks = callbacks

    def begin(self, part: str, step: int, steps: int) -> None:
        """Pass the event to every callback."""
        for callback in self.callbacks:
            callback.begin(part, step, steps)

    def step(self, part: str, step: int) -> None:
        """Pass the event to every callback."""
        for callback in self.callbacks:
            callback.step(part, step)

    def line(self, line: LossCurvePoint) -> None:
        """Pass the event to every callback."""
        for callback in self.callbacks:
            callback.line(line)

    def sheet(self, part: str, images: int, path: Path) -> None:
        """Pass the event to every callback."""
        for callback in self.callbacks:
            callback.sheet(part, images, path)


class LogCallback(TrainingCallback):
    """A log line for each point of the loss curve, for use without a terminal."""

    def line(self, line: LossCurvePoint) -> None:
        """Log one point."""
        log.info("%s step %d loss %.4f %.0f images/s", line.part, line.step, line.loss, line.images_per_s)


class ProgressCallback(TrainingCallback):
    """A progress bar for each optimization, with steps, loss, images per second and time left; used as a context."""

    def __init__(self, console: Console) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressCallback:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bars.stop()

    def begin(self, part: str, step: int, steps: int) -> None:
        """Add a bar."""
        self.tasks[part] = self.bars.add_task(part, total=steps, completed=step, numbers="")

    def step(self, part: str, step: int) -> None:
        """Advance the bar."""
        self.bars.update(self.tasks[part], completed=step)

    def line(self, line: LossCurvePoint) -> None:
        """Show the loss and the rate beside the bar."""
        numbers = f"loss {line.loss:.4f}  {line.images_per_s:.0f} images/s"
        self.bars.update(self.tasks[line.part], numbers=numbers)


class WandbCallback(TrainingCallback):
    """Loss, learning rate, images per second and sheets of samples as one wandb run, over the images seen.

    The run's id is in ``<folder>/wandb-<name>.id``, so that a killed training continues in the same run. wandb is a
    mirror: ``mirror`` reports an error there once, and the training continues without it.

    Args:
        config: The `logger.wandb` group.
        declared: The whole configuration.
        folder: The training's folder; it holds `wandb/`.
        name: What is trained, such as the family.
        mirror: Function that runs a call, reports its failure and returns whether it succeeded.
    """

    def __init__(
        self,
        config: WandbConfig,
        declared: dict[str, object],
        folder: Path,
        name: str,
        mirror: Callable[[Callable[[], None]], bool],
    ) -> None:
        self.mirror = mirror
        self.run: wandb.Run | None = None
        self.failed = False
        mode = connected_mode(config.mode)
        if mode != "disabled":
            mirror(lambda: self._open(config, mode, declared, folder, name))

    def begin(self, part: str, step: int, steps: int) -> None:
        """Define the step metric of a part."""

        def define(run: wandb.Run) -> None:
            run.define_metric(f"{part}/*", step_metric=f"{part}/images")

        self._with_run(define)

    def line(self, line: LossCurvePoint) -> None:
        """Log one point."""
        names = ("images", "loss", "lr", "images_per_s")
        self._with_run(lambda run: run.log({f"{line.part}/{name}": getattr(line, name) for name in names}))

    def sheet(self, part: str, images: int, path: Path) -> None:
        """Log a sheet of samples."""

        def show(run: wandb.Run) -> None:
            import wandb

            run.log({f"{part}/images": images, f"{part}/samples": wandb.Image(str(path))})

        self._with_run(show)

    def finish(self, status: Status) -> None:
        """End the run with the training's status."""

        def end(run: wandb.Run) -> None:
            run.summary.update({"state": status.state, "error": status.error})
            run.finish(exit_code=0 if status.state == "ok" else 1)

        if self.run is not None:
            run = self.run
            self.mirror(lambda: end(run))

    def _open(self, config: WandbConfig, mode: str, declared: dict[str, object], folder: Path, name: str) -> None:
        id_file = folder / f"wandb-{name}.id"
        if not id_file.exists():
            write_atomically(id_file, secrets.token_hex(4).encode())
        title = f"{folder.name}-{name}"
        self.run = open_run(config, mode, folder, "train", used_config(declared), title, run_id=id_file.read_text())

    def _with_run(self, call: Callable[[wandb.Run], None]) -> None:
        run = self.run
        if run is not None and not self.failed:
            self.failed = not self.mirror(lambda: call(run))
