"""The state of one image on its way through the stages, and what every stage may use of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from harness import messages
from harness.device.clock import Clock
from harness.device.energy import EnergyMeter, NoEnergy
from harness.device.memory import MemoryMeter
from harness.messages import GenerationRequest
from harness.parallel.group import TrafficCounter
from harness.pipeline.cache_state import CacheState
from models.components import Conditioning
from schedulers.grid import Grid
from schedulers.noise_scheduler import NoiseScheduler

T = TypeVar("T")
OnProgress: TypeAlias = Callable[[str, int, int], None]
"""Called with (stage, 0, 0) at the start of a stage, and with (stage, done, total) after each step of it.

Those are solver steps while an image denoises, and images while they decode."""
WithSolver: TypeAlias = Callable[[str], NoiseScheduler]
"""Returns the noise scheduler with a solver by name, or raises ValueError."""
OnPreview: TypeAlias = Callable[[int, int, bytes], None]
"""Called with the finished and all solver steps, and a PNG of the first image's x0 estimate."""


@dataclass
class EvaluationCounter:
    """The number of denoiser forwards on this rank and of their batch rows; a guided image has two rows."""

    evaluations: int = 0
    rows: int = 0

    def add(self, rows: int) -> None:
        """Count one forward."""
        self.evaluations += 1
        self.rows += rows


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the denoiser, with what is kept for the next ones.

    Args:
        network: the denoiser.
        latent: the input of the network, (B, ...).
        tau_B: the time of each row.
        condition: the conditioning, B rows, precomputed or not.
        state: what the block cache keeps of each row's image; empty for a network without one.
    """

    network: nn.Module
    latent: Tensor
    tau_B: Tensor
    condition: Conditioning
    state: tuple[CacheState, ...] = ()

    @property
    def batch_key(self) -> tuple[object, ...]:
        """What evaluations in one forward have in common: network, shape of a row, and fields of the conditioning."""
        absent = tuple(getattr(self.condition, f.name) is None for f in fields(Conditioning) if f.name != "mask")
        return id(self.network), tuple(self.latent.shape[1:]), absent

    @property
    def is_divisible(self) -> bool:
        """Whether its rows may be computed in different forwards: a block cache looks at both rows of an image."""
        return len(self.latent) > 1 and not self.state

    def row(self, index: int) -> Evaluation:
        """Return the evaluation of one row."""
        one = slice(index, index + 1)
        columns = {f.name: getattr(self.condition, f.name) for f in fields(Conditioning)}
        condition = Conditioning(**{name: None if column is None else column[one] for name, column in columns.items()})
        return Evaluation(self.network, self.latent[one], self.tau_B[one], condition)

    @staticmethod
    def stack(parts: Sequence[Evaluation]) -> Evaluation:
        """Concatenate evaluations with the same batch key into one."""
        return Evaluation(
            parts[0].network,
            torch.cat([part.latent for part in parts]),
            torch.cat([part.tau_B for part in parts]),
            Conditioning.stack([part.condition for part in parts]),
            tuple(kept for part in parts for kept in part.state),
        )


Evaluate: TypeAlias = Callable[[Evaluation], Tensor]
"""Returns the network's output, (B, ...), evaluated directly or together with other requests."""


def evaluate_directly(evaluation: Evaluation) -> Tensor:
    """Evaluate the network for this request alone."""
    kept = (evaluation.state,) if evaluation.state else ()
    output: Tensor = evaluation.network(evaluation.latent, evaluation.tau_B, evaluation.condition, *kept)
    return output


class Cancelled(Exception):
    """Raised between two solver steps if the request is cancelled."""


@dataclass(frozen=True)
class ImageSpec:
    """What was requested of one image or video.

    Args:
        index: the index of the image in its request.
        prompt: the prompt.
        negative_prompt: the negative prompt.
        seed: the seed of its noise.
        steps: solver steps.
        guidance: the guidance scale; 1 is no guidance.
        height: height in pixels.
        width: width in pixels.
        frames: the number of frames; 1 for an image.
    """

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    height: int
    width: int
    frames: int = 1


@dataclass
class Sample:
    """One image in progress. A field is None until the stage that writes it has run.

    Args:
        spec: what was requested.
        text: the conditioning of the prompt, one row; written by text encoding.
        negative: the conditioning of the negative prompt, one row, if guidance needs it; written by text encoding.
        grid: the grid of the solver; written by timestep preparation.
        start: the state at the grid's first row, LatentSpace.shape, float32; written by latent preparation.
        latent: the final state, of the same shape, float32; written by denoising.
        states: the state after every step, if requested; written by denoising.
        pixels: (3, height, width), or (frames, 3, height, width), float32 in [0, 1]; written by decoding.
    """

    spec: ImageSpec
    text: Conditioning | None = None
    negative: Conditioning | None = None
    grid: Grid | None = None
    start: Tensor | None = None
    latent: Tensor | None = None
    states: list[Tensor] = field(default_factory=list)
    pixels: Tensor | None = None


@dataclass
class RunContext:
    """What the stages share during one request on one rank.

    Args:
        device: the device of the networks.
        batch_size: images per network forward.
        clock: the times of this request.
        memory: the meter of memory.
        on_progress: called with (stage, 0, 0) at the start of a stage, and with (stage, done, total) after each solver
            step of this rank.
        check_cancelled: raises Cancelled once the request is cancelled; the ranks of a replica agree on the step.
        traffic: the count of what this rank sends to the ranks that it computes with.
        energy: the energy meter of this rank's GPU, or of its machine.
        notes: notes for the record.
        comm: what was sent, by stage and kind of collective; written by the executor.
        keep_states: whether samples store their state after every step.
        evaluate: evaluates the denoiser.
        counter: the count of evaluations.
        skips: what caches skipped for each image; written by denoising.
        any_in_replica: returns whether a flag is set on any rank that computes these images; a collective.
        solver: the solver of the request; empty for the configuration's.
        previews: the number of previews of the request's first image.
        on_preview: called with (done, total) solver steps and a PNG; None on ranks that only compute previews.
        pause: lets other requests have their turn before a long piece of work.
    """

    device: torch.device
    batch_size: int
    clock: Clock
    memory: MemoryMeter
    on_progress: OnProgress
    check_cancelled: Callable[[], None]
    traffic: TrafficCounter = field(default_factory=TrafficCounter)
    energy: EnergyMeter = field(default_factory=NoEnergy)
    notes: list[str] = field(default_factory=list)
    comm: dict[str, dict[str, messages.CollectiveTraffic]] = field(default_factory=dict)
    keep_states: bool = False
    evaluate: Evaluate = evaluate_directly
    counter: EvaluationCounter = field(default_factory=EvaluationCounter)
    skips: list[messages.CacheSkips] = field(default_factory=list)
    any_in_replica: Callable[[bool], bool] = lambda flag: flag
    solver: str = ""
    previews: int = 0
    on_preview: OnPreview | None = None
    pause: Callable[[], None] = lambda: None

    def require_finite(self, tensors: Iterable[Tensor]) -> None:
        """Refuse values that are not finite, on every rank of the replica alike.

        Args:
            tensors: what a stage has written on this rank.

        Raises:
            ValueError: if a rank of the replica has a value that is not finite.
        """
        if self.any_in_replica(not all(bool(x.isfinite().all()) for x in tensors)):
            raise ValueError("the image has values that are not finite; try model.dtype=float32 or another solver")


def image_specs(request: GenerationRequest) -> list[ImageSpec]:
    """Return the images of a request, prompt by prompt; image k has seed + k."""
    prompts = [prompt for prompt in request.prompts for _ in range(request.samples_per_prompt)]
    return [
        ImageSpec(
            index,
            prompt,
            request.negative_prompt,
            request.seed_of(index),
            request.steps,
            request.guidance,
            request.height,
            request.width,
            request.frames,
        )
        for index, prompt in enumerate(prompts)
    ]


def require(value: T | None) -> T:
    """Return a field that an earlier stage has written; the wiring is checked when the pipeline is built.

    Args:
        value: the field.

    Returns:
        The field, not None.

    Raises:
        RuntimeError: if it was not written.
    """
    if value is None:
        raise RuntimeError("a stage ran before the one that writes what it reads")
    return value


def micro_batches(samples: list[T], size: int) -> list[list[T]]:
    """Return consecutive groups of at most `size` samples."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]
