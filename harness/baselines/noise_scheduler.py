"""The noise scheduler in a pipeline: the checkpoint's own diffusers class, or ours behind the diffusers interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from harness.resolve.published_scheduler import scheduler_file
from models.checkpoint_source import CheckpointSource
from models.files import read_json
from schedulers.diffusers_adapter import DiffusersAdapter
from schedulers.grid import Grid, Point
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import Estimate, LearnedVariance
from schedulers.solvers.base import SolverState

PipelineScheduler: TypeAlias = SchedulerMixin | DiffusersAdapter
MakeScheduler: TypeAlias = Callable[[int, Callable[[int], Tensor]], PipelineScheduler]
"""A function from the tokens of an image and the noise of each step to the noise scheduler of a pipeline."""


class NativeGridScheduler(DiffusersAdapter):
    """The run's own grid, whatever sigmas and shift a pipeline passes to a flow's noise scheduler."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a request. Raises ValueError if no number of steps is given."""
        steps = len(sigmas) if num_inference_steps is None and sigmas is not None else num_inference_steps
        super().set_timesteps(steps, device)
        # WanPipeline looks up a sigma for every evaluation, and a solver step may have several evaluations
        self.sigmas = torch.tensor([*(point.sigma for point in self._points), self.sigmas[-1]], dtype=torch.float32)


def published_scheduler(source: CheckpointSource) -> MakeScheduler:
    """Return a maker of the class that the checkpoint's scheduler_config.json names, unchanged."""
    raw = read_json(scheduler_file(source.folder))
    kind: type[SchedulerMixin] = getattr(diffusers, str(raw["_class_name"]))
    return lambda tokens, noise: kind.from_config(raw)


def native_scheduler(noise_scheduler: NoiseScheduler, scales: bool, steps: int) -> MakeScheduler:
    """Return a maker of our noise scheduler, with the noise of native runs.

    Pipelines pass it outputs without a learned variance.

    Args:
        noise_scheduler: the run's noise scheduler.
        scales: whether the pipeline scales noise and network input as the noise scheduler says.
        steps: the steps of the configured request, with which the noise scheduler is tried.

    Returns:
        The maker.

    Raises:
        ValueError: this noise scheduler cannot drive the pipeline.
    """
    if noise_scheduler.state_dtype is not None:
        raise ValueError("scheduler.state_dtype has no effect in diffusers' pipelines; drop it, or use engine=native")
    prediction = noise_scheduler.prediction
    if isinstance(prediction, LearnedVariance):
        if prediction.use:
            raise ValueError(
                "diffusers' pipelines drop a learned variance; choose another scheduler, or use engine=native"
            )
        noise_scheduler = replace(noise_scheduler, prediction=prediction.prediction)

    def make(tokens: int, noise: Callable[[int], Tensor]) -> PipelineScheduler:
        return NativeGridScheduler(noise_scheduler, tokens=tokens, noise=noise)

    NativeGridScheduler(noise_scheduler, tokens=1).set_timesteps(steps)
    grid = noise_scheduler.grid(steps, 1)
    if not scales and (grid.init_std != 1 or bool((grid.c_in != 1).any())):
        raise ValueError(
            "this pipeline of diffusers scales neither noise nor network input, and this noise scheduler needs that; "
            "choose another scheduler.path or scheduler.prediction, or use engine=native"
        )
    return make


def adds_noise(noise_scheduler: NoiseScheduler, grid: Grid) -> bool:
    """Return whether a solver adds noise between its first and last state, found by running it on one number."""
    keys: list[int] = []
    one, memory = torch.ones(1, 1, 1, 1, dtype=torch.float64), SolverState()

    def denoise(x: Tensor, point: Point) -> Estimate:
        return Estimate(one, one, one)

    def noise(key: int) -> Tensor:
        keys.append(key)
        return one

    for i in range(grid.steps):
        noise_scheduler.solver.step(one, i, grid, denoise, memory, noise)
    return bool(keys)
