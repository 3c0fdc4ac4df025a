"""The state of one picture on its way through the stages, and what every stage may ask of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from harness import messages
from harness.device.clock import Clock
from harness.device.energy import Energy, NoEnergy
from harness.device.memory import Memory
from harness.messages import GenerationRequest
from harness.parallel.group import Traffic
from harness.pipeline.cache_state import History
from models.components import Conditioning
from schedulers.grid import Grid

T = TypeVar("T")
OnProgress: TypeAlias = Callable[[str, int, int], None]
Owners: TypeAlias = tuple[History, ...]


class Evaluate(Protocol):
    """How an evaluation of the denoiser is made: at once, or together with those of other requests. `owners` are the
    histories of each row's picture, which a network behind gates reads; none for any other.
    """

    def __call__(
        self, network: nn.Module, latent: Tensor, tau_B: Tensor, condition: Conditioning, owners: Owners, /
    ) -> Tensor: ...


def at_once(network: nn.Module, latent: Tensor, tau_B: Tensor, condition: Conditioning, owners: Owners = ()) -> Tensor:
    """An evaluation alone."""
    output: Tensor = network(latent, tau_B, condition, *([owners] if owners else []))
    return output


class Cancelled(Exception):
    """The request shall not be drawn to its end; raised between two solver steps."""


@dataclass(frozen=True)
class Ask:
    """What was asked of one picture or video; sizes in pixels."""

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
    """One picture in the making. A field is None until the stage that writes it has run."""

    ask: Ask  # the request
    text: Conditioning | None = None  # text encoding: one row, of the prompt
    negative: Conditioning | None = None  # text encoding: one row, of the negative prompt, where guidance needs it
    grid: Grid | None = None  # timestep preparation
    start: Tensor | None = None  # latent preparation: the state at the grid's first row, LatentSpace.shape, float32
    latent: Tensor | None = None  # denoising: the same shape, float32
    states: list[Tensor] = field(default_factory=list)  # denoising: the state after every step, where it is asked for
    pixels: Tensor | None = None  # decoding: (3, height, width), or (frames, 3, height, width), float32 in [0, 1]


@dataclass
class RunContext:
    """What the stages share during one request on one rank.

    Args:
        device: where the networks are.
        batch_size: pictures a network forward carries.
        clock: times of this request.
        memory: the memory account.
        on_progress: told (stage, 0, 0) as a stage begins, and (stage, done, total) after each solver step of this rank.
        check_cancelled: raises Cancelled once the request is cancelled; the ranks of a replica agree on the step.
        traffic: counts what this rank sends to those that it computes with.
        energy: what its GPU, or its machine, uses.
        notes: for the record.
        comm: what was sent, by stage and kind of collective; the executor writes it.
        keep_states: whether samples keep their state after every step.
        evaluate: makes the denoiser's evaluations.
        skips: what a cache spared each picture; denoising writes it.
    """

    device: torch.device
    batch_size: int
    clock: Clock
    memory: Memory
    on_progress: OnProgress
    check_cancelled: Callable[[], None]
    traffic: Traffic = field(default_factory=Traffic)
    energy: Energy = field(default_factory=NoEnergy)
    notes: list[str] = field(default_factory=list)
    comm: dict[str, dict[str, messages.CollectiveTraffic]] = field(default_factory=dict)
    keep_states: bool = False
    evaluate: Evaluate = at_once
    skips: list[messages.CacheSkips] = field(default_factory=list)


def asks(request: GenerationRequest) -> list[Ask]:
    """The pictures of a request, prompt by prompt; picture k has seed + k."""
    prompts = [prompt for prompt in request.prompts for _ in range(request.samples_per_prompt)]
    return [
        Ask(
            index,
            prompt,
            request.negative_prompt,
            request.seed + index,
            request.steps,
            request.guidance,
            request.height,
            request.width,
            request.frames,
        )
        for index, prompt in enumerate(prompts)
    ]


def written(value: T | None) -> T:
    """A field that an earlier stage has written (wiring is checked when the pipeline is built).

    Raises:
        RuntimeError: it has not.
    """
    if value is None:
        raise RuntimeError("a stage ran before the one that writes what it reads")
    return value


def micro_batches(samples: list[T], size: int) -> list[list[T]]:
    """Consecutive groups of at most `size`."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]
