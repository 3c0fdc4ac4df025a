"""The worker of one rank: a request in, this rank's pictures and report out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.device.clock import Clock
from harness.device.cuda import synchronizer
from harness.device.energy import EnergyMeter, NoEnergy
from harness.device.memory import MemoryMeter
from harness.messages import (
    Array,
    ArrayRef,
    Failure,
    GenerationRequest,
    Latents,
    LoadedComponent,
    RankOutcome,
    RankReport,
    SampleResult,
    encode,
)
from harness.parallel.connect import Axes, one_rank
from harness.parallel.mesh import Place
from harness.pipeline.composed import ComposedPipeline
from harness.pipeline.interleave import Course
from harness.pipeline.state import (
    Cancelled,
    Evaluate,
    OnProgress,
    Owners,
    RunContext,
    Sample,
    asks,
    at_once,
    micro_batches,
    written,
)
from harness.serving.faults import failure_kind, failure_line
from models.components import Conditioning

log = logging.getLogger(__name__)


@dataclass
class Counter:
    """Forwards of the denoiser on this rank, and the rows that they carried; a guided picture is two."""

    evaluations: int = 0
    rows: int = 0

    def add(self, rows: int) -> None:
        """Counts a forward."""
        self.evaluations += 1
        self.rows += rows


class Worker:
    """Runs the pipeline over this rank's share of a request.

    Args:
        pipeline: the built pipeline.
        place: this rank's place on the mesh.
        device: where the networks are.
        memory: the memory account.
        loaded: what was loaded for the pipeline.
        axes: the ranks that it computes with; None for a rank alone.
        energy: what its GPU, or its machine, uses; None where that is not reported.
    """

    def __init__(
        self,
        pipeline: ComposedPipeline,
        place: Place,
        device: torch.device,
        memory: MemoryMeter,
        loaded: Sequence[LoadedComponent] = (),
        axes: Axes | None = None,
        energy: EnergyMeter | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.place = place
        self.device = device
        self.memory = memory
        self.loaded = list(loaded)
        self.axes = one_rank() if axes is None else axes
        self.energy = NoEnergy() if energy is None else energy
        self.counter = Counter()

    def generate(
        self,
        request: GenerationRequest,
        on_progress: OnProgress,
        is_cancelled: Callable[[], bool],
    ) -> list[bytes]:
        """The frames of a RankOutcome: this rank's pictures and report, or what went wrong.

        An exception is answered here only where a rank computes a picture alone; where several do, they would be left
        waiting in a collective, so it ends the rank, and with it the engine.
        """
        everything = micro_batches([Sample(ask) for ask in asks(request)], request.batch_size)
        samples = [sample for batch in self.place.share(everything) for sample in batch]
        self.memory.reset_peak()
        self.axes.traffic.reset()
        self.energy.reset()

        def check_cancelled() -> None:
            if self.axes.any_of_picture(is_cancelled()):
                raise Cancelled

        def counted(
            network: nn.Module, latent: Tensor, tau_B: Tensor, condition: Conditioning, owners: Owners
        ) -> Tensor:
            self.counter.add(len(latent))
            return at_once(network, latent, tau_B, condition, owners)

        run = self._context(request, on_progress, check_cancelled, counted)
        run.traffic, run.energy = self.axes.traffic, self.energy
        return self._answered(request, samples, run)

    def course(self, request: GenerationRequest, on_progress: OnProgress) -> Course[list[bytes]]:
        """The same of all pictures of a request, on a stack of its own that stops at every evaluation; `Cancelled` put
        in place of an output ends it. What it sends is not told from what others send, and so is not in its report.
        """

        def work(evaluate: Evaluate) -> list[bytes]:
            run = self._context(request, on_progress, lambda: None, evaluate)
            run.notes.append("its network forwards were shared with other requests, and its times include theirs")
            return self._answered(request, [Sample(ask) for ask in asks(request)], run)

        return Course(work)

    def _context(
        self,
        request: GenerationRequest,
        on_progress: OnProgress,
        check_cancelled: Callable[[], None],
        evaluate: Evaluate,
    ) -> RunContext:
        clock = Clock(synchronizer(self.device), request.count_flops, request.profile)
        run = RunContext(self.device, request.batch_size, clock, self.memory, on_progress, check_cancelled)
        run.keep_states = request.latents == "steps"
        run.evaluate = evaluate
        return run

    def _answered(self, request: GenerationRequest, samples: list[Sample], run: RunContext) -> list[bytes]:
        try:
            return self._draw(request, samples, run)
        except Cancelled:
            return _failure(request, "cancelled", "the request was cancelled", self.place.rank)
        except Exception as error:
            if self.place.replica_size > 1:
                raise
            log.exception("request %s failed", request.request_id)
            return _failure(request, failure_kind(error), failure_line(error), self.place.rank)

    def _draw(self, request: GenerationRequest, samples: list[Sample], run: RunContext) -> list[bytes]:
        points = self.pipeline.forward(samples, run)
        report = RankReport(
            rank=self.place.rank,
            stages=run.clock.stages,
            denoise_steps_ms=run.clock.steps,
            networks_ms=run.clock.networks_ms,
            network_evaluations=run.clock.evaluations,
            peak_memory_mib=self.memory.peak_mib(),
            memory_checkpoints=points,
            notes=run.notes,
            comm=run.comm,
            flops=run.clock.flops,
            operators=run.clock.operators,
            skips=run.skips,
            energy_j=run.energy.used_j(),
        )
        if self.place.rank % self.place.replica_size:
            return encode(RankOutcome([], report))  # the first rank of a replica answers for it
        pixels = [written(sample.pixels).cpu().numpy() for sample in samples]
        if not all(math.isfinite(float(picture.sum())) for picture in pixels):
            raise ValueError("the picture holds values that are not finite; try model.dtype=float32 or another solver")
        arrays: list[Array] = []

        def sent(x: Array) -> ArrayRef:
            arrays.append(x)
            return ArrayRef(len(arrays), "float32", tuple(x.shape))

        results = []
        for sample, picture in zip(samples, pixels, strict=True):
            told, pixel_ref = latents(sample, request.latents), sent(picture)
            latent_ref = None if told is None else sent(told)
            results.append(SampleResult(sample.ask.index, sample.ask.prompt, sample.ask.seed, pixel_ref, latent_ref))
        return encode(RankOutcome(results, report), arrays)


def latents(sample: Sample, wanted: Latents) -> Array | None:
    """What was asked for of a sample's latents: (1 or solver steps, *latent shape)."""
    if wanted == "none":
        return None
    told: Array = torch.stack(sample.states if wanted == "steps" else [written(sample.latent)]).cpu().numpy()
    return told


def _failure(request: GenerationRequest, kind: str, message: str, rank: int) -> list[bytes]:
    return encode(RankOutcome([], None, Failure(request.request_id, kind, message, rank)))
