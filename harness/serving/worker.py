"""The worker of one rank: takes a request, returns this rank's samples and report."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from harness.device.clock import Clock
from harness.device.cuda import synchronizer
from harness.device.energy import EnergyMeter, NoEnergy
from harness.device.memory import MemoryMeter
from harness.device.trace import NoTrace, RankTrace
from harness.messages import (
    Array,
    ArrayRef,
    Failure,
    GenerationRequest,
    Latents,
    LoadedComponent,
    MemoryPoint,
    RankOutcome,
    RankReport,
    SampleResult,
    encode,
)
from harness.optimize.operator_check import OperatorCheck
from harness.parallel.mesh import RankPosition
from harness.parallel.process_groups import ProcessGroups, single_rank_groups
from harness.pipeline.composed import ComposedPipeline
from harness.pipeline.decode import Decoding
from harness.pipeline.state import (
    Cancelled,
    Evaluate,
    EvaluationCounter,
    OnPreview,
    OnProgress,
    RunContext,
    Sample,
    image_specs,
    micro_batches,
    require,
)
from harness.pipeline.step_batching import RequestFiber, pause
from harness.serving.faults import failure_kind, failure_line, is_in_collective
from harness.serving.parts import Part

log = logging.getLogger(__name__)


@dataclass
class Answer:
    """The answer of this rank to one request.

    Attributes:
        frames: The frames of a RankOutcome.
    """

    frames: list[bytes] = field(default_factory=list)


class Worker:
    """Runs the pipeline over this rank's share of a request.

    Args:
        pipeline: the built pipeline.
        position: this rank's position on the mesh.
        device: the device of the networks.
        memory: the memory meter.
        loaded: the components that were loaded for the pipeline.
        groups: the process groups of this rank; None for a single rank.
        energy: the energy meter of its GPU or machine; None if energy is not reported.
        operators: what compared the pipeline's operators with float64; None if nothing did.
    """

    def __init__(
        self,
        pipeline: ComposedPipeline,
        position: RankPosition,
        device: torch.device,
        memory: MemoryMeter,
        loaded: Sequence[LoadedComponent] = (),
        groups: ProcessGroups | None = None,
        energy: EnergyMeter | None = None,
        operators: OperatorCheck | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.position = position
        self.device = device
        self.memory = memory
        self.loaded = list(loaded)
        self.groups = single_rank_groups() if groups is None else groups
        self.energy = NoEnergy() if energy is None else energy
        self.operators = OperatorCheck(device, enabled=False) if operators is None else operators
        self.counter = EvaluationCounter()

    def generate(
        self,
        request: GenerationRequest,
        on_progress: OnProgress,
        is_cancelled: Callable[[], bool],
        on_preview: OnPreview | None = None,
    ) -> list[bytes]:
        """Run one request on this rank and return the frames of a RankOutcome: samples and report, or the failure.

        An exception becomes a failure if each rank computes its images alone, or if all ranks of the replica raise it
        at the same point. Otherwise the others would wait in a collective, so it ends the rank and with it the engine.

        Args:
            request: the request.
            on_progress: a callback for each stage and solver step.
            is_cancelled: a function called between steps that returns whether to stop.
            on_preview: a callback for each preview; None on ranks that report none.

        Returns:
            The frames of a RankOutcome.
        """
        batches = micro_batches([Sample(spec) for spec in image_specs(request)], request.batch_size)
        samples = [sample for batch in self.position.replica_items(batches) for sample in batch]
        self.memory.reset_peak()
        self.groups.traffic.reset()
        self.energy.reset()

        def check_cancelled() -> None:
            if self.groups.any_in_replica(is_cancelled()):
                raise Cancelled

        run = self._context(request, on_progress, check_cancelled)
        run.traffic, run.energy, run.counter = self.groups.traffic, self.energy, self.counter
        run.on_preview = on_preview
        run.traffic.trace = run.clock.trace
        with self._failure_as_answer(request) as answer:
            with run.clock.trace.recording(lambda: self.groups.any_in_replica(False)):
                points = self.pipeline.executor.execute(self.pipeline.stages, samples, run)
            answer.frames = self._outcome(request, samples, run, points)
        return answer.frames

    def fiber(
        self, part: Part, on_progress: OnProgress, on_preview: OnPreview, notes: list[str]
    ) -> RequestFiber[list[bytes]]:
        """Return a fiber that runs one image of a request and pauses at every evaluation, and before it decodes.

        It has its own stack. Passing `Cancelled` in place of an output ends it. Its traffic cannot be separated from
        that of other requests, so its report leaves it out.

        Args:
            part: the image.
            on_progress: a callback for each stage and solver step.
            on_preview: a callback for each preview, on the first rank of the replica.
            notes: notes for the record; what is added until the end counts.

        Returns:
            The fiber, whose result is the frames of a RankOutcome.
        """

        def report_progress(stage: str, done: int, total: int) -> None:
            if stage == Decoding.name and not total:
                pause()
            on_progress(stage, done, total)

        def work(evaluate: Evaluate) -> list[bytes]:
            samples = [Sample(part.spec)]
            run = self._context(part.request, report_progress, lambda: None)
            run.evaluate, run.notes, run.pause = evaluate, notes, pause
            run.on_preview = None if self.position.rank % self.position.replica_size else on_preview
            run.notes.append("its network forwards were shared with other requests, and its times include theirs")
            with self._failure_as_answer(part.request) as answer:
                points = self.pipeline.executor.execute(self.pipeline.stages, samples, run)
                answer.frames = self._outcome(part.request, samples, run, points)
            return answer.frames

        return RequestFiber(work)

    def may_answer(self, error: Exception) -> bool:
        """Return whether an exception can be answered, so that the engine goes on.

        It can if this rank computes its images alone, or if every rank of the replica has raised one too, outside of a
        collective: then no rank waits for another one.

        Args:
            error: the exception.
        """
        return self.position.replica_size == 1 or (not is_in_collective(error) and self.groups.all_raise())

    def _context(
        self, request: GenerationRequest, on_progress: OnProgress, check_cancelled: Callable[[], None]
    ) -> RunContext:
        clock = Clock(synchronizer(self.device), request.count_flops, request.profile, self._trace(request))
        run = RunContext(self.device, request.batch_size, clock, self.memory, on_progress, check_cancelled)
        run.keep_states, run.previews = request.latents == "steps", request.previews
        run.any_in_replica, run.solver = self.groups.any_in_replica, request.solver
        return run

    def _trace(self, request: GenerationRequest) -> NoTrace:
        if request.trace_from_ns is None:
            return NoTrace()
        return RankTrace(self.position.rank, self.position.world_size, self.device, request.trace_from_ns)

    @contextmanager
    def _failure_as_answer(self, request: GenerationRequest) -> Iterator[Answer]:
        """Turn an exception of the block into the answer, if the ranks that compute the same images agree."""
        answer = Answer()
        try:
            yield answer
        except Cancelled:
            answer.frames = _failure(request, "cancelled", "the request was cancelled", self.position.rank)
        except Exception as error:
            if not self.may_answer(error):
                raise
            log.exception("request %s failed", request.request_id)
            answer.frames = _failure(request, failure_kind(error), failure_line(error), self.position.rank)

    def _outcome(
        self, request: GenerationRequest, samples: list[Sample], run: RunContext, points: list[MemoryPoint]
    ) -> list[bytes]:
        """Return the frames of a RankOutcome with what the stages left in the samples and in the run's context."""
        used = run.clock.process_usage()
        report = RankReport(
            rank=self.position.rank,
            stages=run.clock.stages,
            denoise_steps_ms=run.clock.steps,
            networks_ms=run.clock.networks_ms,
            network_evaluations=run.clock.evaluations,
            peak_memory_mib=self.memory.peak_mib(),
            memory_checkpoints=points,
            notes=[*run.notes, *self.operators.notes()],
            comm=run.comm,
            flops=run.clock.flops,
            operators=run.clock.operators,
            operator_errors=self.operators.errors,
            skips=run.skips,
            energy_j=run.energy.used_j(),
            cpu_s=used.cpu_s,
            involuntary_switches=used.involuntary_switches,
            waited_s=used.waited_s,
            trace=run.clock.trace.encode(),
            memory_snapshot=run.clock.trace.memory_snapshot,
        )
        if self.position.rank % self.position.replica_size:
            return encode(RankOutcome([], report))  # the first rank of a replica sends its samples
        pixels = [require(sample.pixels).cpu().numpy() for sample in samples]
        if not all(math.isfinite(float(image.sum())) for image in pixels):
            raise ValueError("the image has values that are not finite; try model.dtype=float32 or another solver")
        arrays: list[Array] = []

        def add_array(x: Array) -> ArrayRef:
            arrays.append(x)
            return ArrayRef(len(arrays), "float32", tuple(x.shape))

        results = []
        for sample, image in zip(samples, pixels, strict=True):
            states, pixel_ref = requested_latents(sample, request.latents), add_array(image)
            latent_ref = None if states is None else add_array(states)
            results.append(SampleResult(sample.spec.index, sample.spec.prompt, sample.spec.seed, pixel_ref, latent_ref))
        return encode(RankOutcome(results, report), arrays)


def requested_latents(sample: Sample, kind: Latents) -> Array | None:
    """Return the latents of a sample that the request asked for: (1 or solver steps, *latent shape)."""
    if kind == "none":
        return None
    states: Array = torch.stack(sample.states if kind == "steps" else [require(sample.latent)]).cpu().numpy()
    return states


def _failure(request: GenerationRequest, kind: str, message: str, rank: int) -> list[bytes]:
    return encode(RankOutcome([], None, Failure(request.request_id, kind, message, rank)))
