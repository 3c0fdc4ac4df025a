"""The requests of one configuration in the order in which they are made, and the record that they become."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from rich.progress import Progress

from harness.client.build_record import trace_row
from harness.client.generator import DiffusionGenerator, Generation
from harness.config.optimize import Optimize
from harness.config.tasks import TRAITS
from harness.config.yaml import to_dict
from harness.engines.protocol import OnProgress
from harness.messages import Array, EngineInfo, GenerationResult, Latents
from harness.messages import Progress as StepProgress
from harness.records.record import Record, Repeat, RunFolder, SampleRow, fingerprint
from harness.resolve.engines_table import NATIVE
from harness.tasks.common.fidelity import MeasuredOutputs
from harness.tasks.common.references import GeneratedOutput

TRACE = "trace.json.gz"
NO_GRAPHS = "the traced request ran its kernels one by one: a replayed CUDA graph shows no operators"


class MeasurementSession:
    """Warm-up and repeats on one generator, which stays warm between them.

    Args:
        generator: Generator of the configuration.
        bars: Progress display.
        name: Prefix of the session's progress labels.

    Attributes:
        generator: Generator of the configuration.
        repeats: Measurements so far, one per repeat.
        outputs: Outputs of the repeats so far, if the error is measured by them.
    """

    def __init__(self, generator: DiffusionGenerator, bars: Progress, name: str = "") -> None:
        self.generator = generator
        self.repeats: list[Repeat] = []
        self.outputs: MeasuredOutputs | None = None
        self._last: Generation | None = None
        self._bars = bars
        self._name = f"{name}: " if name else ""
        self._results: list[GenerationResult] = []
        self._warmup_ms: list[float] = []
        self._flops_result: GenerationResult | None = None
        self._profile_result: GenerationResult | None = None
        self._traced: Generation | None = None

    def start(self) -> None:
        """Start the ranks.

        Raises:
            EngineGone: A rank died, or was not ready in time.
        """
        task = self._bars.add_task(f"{self._name}starting ranks", total=None)

        def on_wait(info: EngineInfo | None) -> None:
            state = "starting ranks" if info is None else f"{info.state} on {info.world_size} ranks"
            self._bars.update(task, description=f"{self._name}{state}")

        self.outputs = MeasuredOutputs(self.generator.start(on_wait))
        self._bars.remove_task(task)

    def warm_up(self) -> None:
        """Generate task.warmup times; these times are recorded apart from the repeats.

        A bench counts the operations of the first request, which runs uncompiled for that (harness.device.flops). So
        it is followed by more, of which the last is as plain as the repeats.

        Raises:
            RequestFailed: The engine answered with a typed error.
            EngineGone: A rank died.
        """
        task = self.generator.config.task
        for number in range(task.warmup + self._extra_warmups()):
            counts = number == 0 and TRAITS[task.name].measures
            with self._progress("warming up") as on_progress:
                generation = self.generator.generate(latents=self._latents, count_flops=counts, on_progress=on_progress)
            self._warmup_ms.append(generation.client_ms)
            self._flops_result = generation.result if counts else self._flops_result

    def _extra_warmups(self) -> int:
        """Return the number of further warm-up requests that a bench needs after the counted one.

        One is plain, because the counted one takes another path than the repeats. Those before it compile blocks, or
        run what is captured next as CUDA graphs (harness.optimize.graphs).
        """
        config = self.generator.config
        if config.task.warmup == 0 or not TRAITS[config.task.name].measures:
            return 0
        if self._records_graphs:
            return 3
        return 2 if config.engine.optimize is Optimize.compile else 1

    @property
    def _records_graphs(self) -> bool:
        """Whether networks are recorded as CUDA graphs."""
        engine, device = self.generator.config.engine, self.generator.info.device if self.generator.info else ""
        records = engine.name == NATIVE and engine.optimize is not Optimize.none and engine.eager.cuda_graphs
        return records and device.startswith("cuda")

    def repeat(self) -> None:
        """Generate once and record the times.

        Raises:
            RequestFailed: The engine answered with a typed error.
            EngineGone: A rank died.
        """
        number, repeats = len(self.repeats) + 1, self.generator.config.task.repeats
        with self._progress(f"generating {number} of {repeats}") as on_progress:
            generation = self._last = self.generator.generate(latents=self._latents, on_progress=on_progress)
        self.repeats.append(generation.repeat)
        self._results.append(generation.result)
        if self.outputs is not None and self._latents != "none":
            self.outputs.add(GeneratedOutput(generation.latents, generation.pixels))
            self.outputs.operators = [row for rank in generation.result.ranks for row in rank.operator_errors]

    @property
    def last(self) -> Generation:
        """The output of the last repeat."""
        if self._last is None:
            raise RuntimeError("nothing was measured; call repeat() first")
        return self._last

    @property
    def pixels(self) -> list[Array]:
        """The images of the last repeat."""
        return self.last.pixels

    def profile(self) -> None:
        """Generate once and time every operator.

        Raises:
            RequestFailed: The engine answered with a typed error.
            EngineGone: A rank died.
        """
        with self._progress("profiling") as on_progress:
            generation = self.generator.generate(latents=self._latents, profile=True, on_progress=on_progress)
        self._profile_result = generation.result

    def trace(self) -> None:
        """Generate once and trace every rank.

        Raises:
            RequestFailed: The engine answered with a typed error.
            EngineGone: A rank died.
        """
        with self._progress("tracing") as on_progress:
            self._traced = self.generator.generate(latents=self._latents, trace=True, on_progress=on_progress)

    def save_trace(self, record: Record, folder: RunFolder) -> Record:
        """Write the trace, if there is one, and return the record with its row.

        Args:
            record: The session's record.
            folder: The run's folder.

        Returns:
            The record.

        Raises:
            RunFolderError: The trace cannot be written.
        """
        if self._traced is None:
            return record
        folder.write_file(TRACE, self._traced.trace())
        ranks, snapshots = self._traced.result.ranks, []
        for report in ranks:
            if report.memory_snapshot:
                snapshots.append(f"memory_rank{report.rank}.pickle")
                folder.write_file(snapshots[-1], report.memory_snapshot)
        row = trace_row(TRACE, self._traced.repeat, ranks, self.repeats, snapshots)
        notes = [*record.notes, NO_GRAPHS] if self._records_graphs else record.notes
        return msgspec.structs.replace(record, trace=row, notes=notes)

    def record(self) -> Record:
        """Return the record of all repeats so far, without the image files."""
        return self.generator.record(
            self.generator.config.request,
            self.repeats,
            self._results,
            self._warmup_ms,
            self.pixels,
            self._flops_result,
            self._profile_result,
        )

    def save_images(self, folder: RunFolder) -> list[SampleRow]:
        """Write the images of the last repeat, and return the rows that name their files."""
        return self.last.save(folder.path, fingerprint(to_dict(self.generator.config)))

    def save(self, record: Record, folder: RunFolder) -> None:
        """Write the images of the last repeat, and the record with their file names."""
        folder.write_record(msgspec.structs.replace(record, samples=self.save_images(folder)))

    @property
    def _latents(self) -> Latents:
        """The latents that every request asks for, as far as the error is measured by them."""
        task = self.generator.config.task
        return "steps" if task.fidelity_per_step else "last" if task.fidelity else "none"

    @contextmanager
    def _progress(self, label: str) -> Iterator[OnProgress]:
        """Show a bar with a label inside the block; yield the callback that moves it."""
        task = self._bars.add_task(self._name + label, total=None)

        def on_progress(progress: StepProgress) -> None:
            description = f"{self._name}{label}: {progress.stage.replace('_', ' ')}"
            self._bars.update(task, description=description, completed=progress.done, total=progress.total or None)

        yield on_progress
        self._bars.remove_task(task)
