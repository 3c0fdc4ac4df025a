"""The requests of one configuration, in the order they were made, and the row that they become."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness.client.build_record import make_repeat
from harness.client.generator import DiffusionGenerator, Generation
from harness.config.optimize import Optimize
from harness.config.schema import Task
from harness.config.yaml import to_dict
from harness.messages import Array, EngineInfo, GenerationResult, Latents
from harness.messages import Progress as StepProgress
from harness.records.record import Record, Repeat, RunFolder, SampleRow, fingerprint
from harness.resolve.engines_table import NATIVE


class Series:
    """Warm-up and repeats on one generator, which stays warm between them.

    Args:
        generator: of the configuration.
        bars: where the progress goes.
        name: of the series, before what its bars say.
    """

    def __init__(self, generator: DiffusionGenerator, bars: Progress, name: str = "") -> None:
        self.generator = generator
        self.repeats: list[Repeat] = []
        self._last: Generation | None = None
        self._bars = bars
        self._name = f"{name}: " if name else ""
        self._results: list[GenerationResult] = []
        self._warmup_ms: list[float] = []
        self._counted: GenerationResult | None = None
        self._profiled: GenerationResult | None = None

    def start(self) -> None:
        """Starts the ranks.

        Raises:
            EngineGone: a rank died, or was not ready in time.
        """
        task = self._bars.add_task(f"{self._name}starting ranks", total=None)

        def on_wait(info: EngineInfo | None) -> None:
            state = "starting ranks" if info is None else f"{info.state} on {info.world_size} ranks"
            self._bars.update(task, description=f"{self._name}{state}")

        self.generator.start(on_wait)
        self._bars.remove_task(task)

    def warm_up(self) -> None:
        """Draws as often as the configuration warms up; the times are kept apart. A bench counts the operations of the
        first, which runs uncompiled for it (harness.device.flops): where those after it prepare something, it draws
        more.

        Raises:
            RequestFailed: the engine's typed answer.
            EngineGone: a rank died.
        """
        task = self.generator.config.task
        for number in range(task.warmup + self._preparing()):
            counts = number == 0 and task.name is Task.bench
            drawn = self._draw("warming up", counts)
            self._warmup_ms.append(drawn.client_ms)
            self._counted = drawn.result if counts else self._counted

    def _preparing(self) -> int:
        """Draws after the counted one that compile blocks, or run what is recorded next (harness.optimize.graphs)."""
        config, engine = self.generator.config, self.generator.config.engine
        if config.task.warmup == 0 or config.task.name is not Task.bench or engine.optimize is Optimize.none:
            return 0
        device = self.generator.info.device if self.generator.info else ""
        if engine.name == NATIVE and engine.eager.cuda_graphs and device.startswith("cuda"):
            return 2
        return int(engine.optimize is Optimize.compile)

    def repeat(self) -> None:
        """Draws once, measured.

        Raises:
            RequestFailed: the engine's typed answer.
            EngineGone: a rank died.
        """
        drawn = self._last = self._draw(f"drawing {len(self.repeats) + 1} of {self.generator.config.task.repeats}")
        self.repeats.append(make_repeat(drawn.result, drawn.client_ms))
        self._results.append(drawn.result)

    @property
    def last(self) -> Generation:
        """The answer to the last repeat."""
        if self._last is None:
            raise RuntimeError("nothing was measured; call repeat() first")
        return self._last

    @property
    def pixels(self) -> list[Array]:
        """Its pictures."""
        return self.last.pixels

    def profile(self) -> None:
        """Draws once, its operators timed.

        Raises:
            RequestFailed: the engine's typed answer.
            EngineGone: a rank died.
        """
        self._profiled = self._draw("profiling", profile=True).result

    def record(self) -> Record:
        """The row of all repeats so far, without the pictures' files."""
        return self.generator.record(
            self.generator.config.request,
            self.repeats,
            self._results,
            self._warmup_ms,
            self.pixels,
            self._counted,
            self._profiled,
        )

    def save_pictures(self, folder: RunFolder) -> list[SampleRow]:
        """Writes the last repeat's pictures; the rows that name them."""
        return self.last.save(folder.path, fingerprint(to_dict(self.generator.config)))

    def save(self, record: Record, folder: RunFolder) -> None:
        """Writes the last repeat's pictures, and the record with their names."""
        folder.write_record(msgspec.structs.replace(record, samples=self.save_pictures(folder)))

    def _draw(self, label: str, count_flops: bool = False, profile: bool = False) -> Generation:
        wanted = self.generator.config.task
        latents: Latents = "steps" if wanted.states else "last" if wanted.fidelity else "none"
        task = self._bars.add_task(self._name + label, total=None)

        def on_progress(progress: StepProgress) -> None:
            said = f"{self._name}{label}: {progress.stage.replace('_', ' ')}"
            self._bars.update(task, description=said, completed=progress.done, total=progress.total or None)

        generation = self.generator.generate(
            latents=latents, count_flops=count_flops, profile=profile, on_progress=on_progress
        )
        self._bars.remove_task(task)
        return generation


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """Bars while it lasts; none where nobody is at the terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield bars
