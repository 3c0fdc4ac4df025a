"""Who watches a training: the terminal's bar or log lines, and a wandb run that a restarted training goes on with."""

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
from harness.loggers.wandb import open_run, resolve_mode
from harness.records.record import Status, write_atomically

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LossCurvePoint:
    """One line of the loss curve; the loss is the mean since the line before."""

    part: str
    step: int
    images: int
    loss: float
    lr: float
    images_per_s: float
    elapsed_s: float


class TrainingCallback:
    """Is told how an optimisation goes; a watcher overrides what it wants to hear."""

    def begin(self, part: str, step: int, steps: int) -> None:
        """The optimisation ``part`` starts, or goes on, after ``step`` of ``steps`` updates."""

    def step(self, part: str, step: int) -> None:
        """Update number ``step`` is done."""

    def line(self, line: LossCurvePoint) -> None:
        """A line of the loss curve."""

    def sheet(self, part: str, images: int, path: Path) -> None:
        """A sheet of samples, drawn after ``images`` images, is on disk."""


class TrainingCallbacks(TrainingCallback):
    """Several as one."""

    def __init__(self, watchers: Sequence[TrainingCallback]) -> None:
        self.watchers = watchers

    def begin(self, part: str, step: int, steps: int) -> None:
        for watcher in self.watchers:
            watcher.begin(part, step, steps)

    def step(self, part: str, step: int) -> None:
        for watcher in self.watchers:
            watcher.step(part, step)

    def line(self, line: LossCurvePoint) -> None:
        for watcher in self.watchers:
            watcher.line(line)

    def sheet(self, part: str, images: int, path: Path) -> None:
        for watcher in self.watchers:
            watcher.sheet(part, images, path)


class LogCallback(TrainingCallback):
    """A log line for each line of the curve, where there is no terminal to draw on."""

    def line(self, line: LossCurvePoint) -> None:
        log.info("%s step %d loss %.4f %.0f images/s", line.part, line.step, line.loss, line.images_per_s)


class ProgressCallback(TrainingCallback):
    """A bar for each optimisation: steps, loss, images a second and the time left. Used as a context."""

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
        self.tasks[part] = self.bars.add_task(part, total=steps, completed=step, numbers="")

    def step(self, part: str, step: int) -> None:
        self.bars.update(self.tasks[part], completed=step)

    def line(self, line: LossCurvePoint) -> None:
        numbers = f"loss {line.loss:.4f}  {line.images_per_s:.0f} images/s"
        self.bars.update(self.tasks[line.part], numbers=numbers)


class WandbCallback(TrainingCallback):
    """Loss, learning rate, images a second and sheets of samples as one wandb run, over the images seen.

    The run's id is kept in ``<folder>/wandb-<name>.id``, so a training that was killed goes on in the same run. wandb
    is a mirror: what goes wrong there is said once by ``mirror``, and the training goes on without it.

    Args:
        config: the `logger.wandb` group.
        declared: the whole configuration.
        folder: the training's folder; `wandb/` is in it.
        name: what is trained there, such as the family.
        mirror: runs a call, tells of its failure and returns whether it went well.
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
        mode = resolve_mode(config.mode)
        if mode != "disabled":
            mirror(lambda: self._open(config, mode, declared, folder, name))

    def begin(self, part: str, step: int, steps: int) -> None:
        def define(run: wandb.Run) -> None:
            run.define_metric(f"{part}/*", step_metric=f"{part}/images")

        self._with_run(define)

    def line(self, line: LossCurvePoint) -> None:
        names = ("images", "loss", "lr", "images_per_s")
        self._with_run(lambda run: run.log({f"{line.part}/{name}": getattr(line, name) for name in names}))

    def sheet(self, part: str, images: int, path: Path) -> None:
        def show(run: wandb.Run) -> None:
            import wandb

            run.log({f"{part}/images": images, f"{part}/samples": wandb.Image(str(path))})

        self._with_run(show)

    def finish(self, status: Status) -> None:
        """Ends the run with the training's status."""

        def end(run: wandb.Run) -> None:
            run.summary.update({"state": status.state, "error": status.error})
            run.finish(exit_code=0 if status.state == "ok" else 1)

        if self.run is not None:
            run = self.run
            self.mirror(lambda: end(run))

    def _open(self, config: WandbConfig, mode: str, declared: dict[str, object], folder: Path, name: str) -> None:
        kept = folder / f"wandb-{name}.id"
        if not kept.exists():
            write_atomically(kept, secrets.token_hex(4).encode())
        title = f"{folder.name}-{name}"
        self.run = open_run(config, mode, folder, "train", declared, title, run_id=kept.read_text())

    def _with_run(self, call: Callable[[wandb.Run], None]) -> None:
        run = self.run
        if run is not None and not self.failed:
            self.failed = not self.mirror(lambda: call(run))
