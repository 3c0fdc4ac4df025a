"""The noise scheduler in a pipeline's slot: the checkpoint's own class of diffusers, or ours in its vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from harness.resolve.published_scheduler import scheduler_file
from models.files import read_json
from models.source import Source
from schedulers.drop_in import DiffusersView
from schedulers.grid import Grid, Point
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import Estimate, LearnedVariance
from schedulers.solvers.base import Memory

PipelineScheduler: TypeAlias = SchedulerMixin | DiffusersView
MakeScheduler: TypeAlias = Callable[[int, Callable[[int], Tensor]], PipelineScheduler]
"""What goes into a pipeline's slot, from the tokens of a picture and the noise of each step."""


class NativeGridScheduler(DiffusersView):
    """The run's own grid, whatever sigmas and shift a pipeline would give a flow's noise scheduler."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a request. Raises ValueError where no number of steps is given."""
        steps = len(sigmas) if num_inference_steps is None and sigmas is not None else num_inference_steps
        super().set_timesteps(steps, device)
        # WanPipeline looks a sigma up for every evaluation, of which a solver's step may have several
        self.sigmas = torch.tensor([*(point.sigma for point in self._points), self.sigmas[-1]], dtype=torch.float32)


def published_scheduler(source: Source) -> MakeScheduler:
    """The class that the checkpoint's scheduler_config.json names, as it is."""
    raw = read_json(scheduler_file(source.folder))
    kind: type[SchedulerMixin] = getattr(diffusers, str(raw["_class_name"]))
    return lambda tokens, noise: kind.from_config(raw)


def native_scheduler(noise_scheduler: NoiseScheduler, scales: bool, steps: int) -> MakeScheduler:
    """Our noise scheduler, its noise that of native runs; pipelines hand it outputs without a learned variance.

    Args:
        noise_scheduler: of the run.
        scales: the pipeline scales noise and network input as it is told.
        steps: of the configured request, with which it is tried.

    Raises:
        ValueError: the pipeline cannot be driven by it.
    """
    if noise_scheduler.rounded is not None:
        raise ValueError("scheduler.state_dtype has no effect in diffusers' pipelines; drop it, or use engine=native")
    prediction = noise_scheduler.prediction
    if isinstance(prediction, LearnedVariance):
        if prediction.use:
            raise ValueError("diffusers' pipelines drop a learned variance; choose another, or use engine=native")
        noise_scheduler = replace(noise_scheduler, prediction=prediction.prediction)

    def make(tokens: int, noise: Callable[[int], Tensor]) -> PipelineScheduler:
        return NativeGridScheduler(noise_scheduler, tokens=tokens, noise=noise)

    NativeGridScheduler(noise_scheduler, tokens=1).set_timesteps(steps)
    grid = noise_scheduler.grid(steps, 1)
    if not scales and (grid.init_std != 1 or bool((grid.c_in != 1).any())):
        raise ValueError(
            "this pipeline of diffusers neither scales noise nor network input, and this noise scheduler wants it; "
            "choose another scheduler.path or scheduler.prediction, or use engine=native"
        )
    return make


def adds_noise(noise_scheduler: NoiseScheduler, grid: Grid) -> bool:
    """Whether a solver adds noise between its first state and its last, found by walking it over one number."""
    asked: list[int] = []
    one, memory = torch.ones(1, 1, 1, 1, dtype=torch.float64), Memory()

    def denoise(x: Tensor, point: Point) -> Estimate:
        return Estimate(one, one, one)

    def noise(key: int) -> Tensor:
        asked.append(key)
        return one

    for i in range(grid.steps):
        noise_scheduler.solver.step(one, i, grid, denoise, memory, noise)
    return bool(asked)
