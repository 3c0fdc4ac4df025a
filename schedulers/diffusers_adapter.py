"""A NoiseScheduler with diffusers' interface: pipeline.scheduler = DiffusersAdapter(noise_scheduler).

A solver here pulls: it calls the network itself. A pipeline pushes: it calls the network and passes the output to step.
The adapter connects the two by replay. It stores the outputs for the solver's current step and runs that step again
from its start. When the solver requests one more evaluation, the adapter stops and returns that evaluation's state to
the pipeline.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from schedulers.conventions import for_tokens, replace_innermost
from schedulers.grid import Grid, Point
from schedulers.noise_scheduler import NoiseScheduler, at_least_float32
from schedulers.prediction import Estimate
from schedulers.solvers.base import SolverState
from schedulers.spacing import FlowLinspace, ResolutionShift, Spacing

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class StepOutput:
    """The result of a step, with diffusers' names.

    Attributes:
        prev_sample: The state for the next evaluation.
        pred_original_sample: The estimate of x0 at this evaluation.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class ConfigDict(dict[str, object]):
    """A mapping whose keys are attributes too, as pipelines read a scheduler's config."""

    def __getattr__(self, name: str) -> object:
        if name not in self:
            raise AttributeError(f"this scheduler's config has no {name}")
        return self[name]


class _EvaluationRequest(Exception):
    """The solver needs the network at a point, and no output is left."""

    def __init__(self, x: Tensor, point: Point) -> None:
        super().__init__()
        self.x, self.point = x, point


def evaluation_points(scheduler: NoiseScheduler, grid: Grid) -> list[list[Point]]:
    """Return the points at which the network is called, from a run of the solver on a state of one number.

    Args:
        scheduler: The noise scheduler.
        grid: The points of the solver.

    Returns:
        One list of points per step.

    Raises:
        ValueError: The solver chooses its points from the sample.
    """
    if scheduler.solver.evaluations(grid) is None:
        raise ValueError(
            f"{type(scheduler.solver).__name__} chooses its timesteps from the sample, and diffusers needs them first; "
            "use another solver"
        )
    found: list[list[Point]] = []
    one, state = torch.ones(1, 1, 1, 1, dtype=torch.float64), SolverState()

    def denoise(x: Tensor, point: Point) -> Estimate:
        found[-1].append(point)
        return Estimate(one, one, one)

    for i in range(grid.steps):
        found.append([])
        scheduler.solver.step(one, i, grid, denoise, state, lambda key: one)
    return found


class DiffusersAdapter:
    """Gives a NoiseScheduler the interface that diffusers' pipelines expect.

    It holds the state of one request, as diffusers' own objects do: use one adapter per pipeline, and one request at a
    time. The NoiseScheduler inside stays shared. The internal state is float32 whatever the pipeline's dtype, as long
    as the pipeline returns the state unchanged. Steps start only at the first row.

    Attributes:
        scheduler: The noise scheduler.
        config: The scheduler configuration for the pipeline; the adapter itself does not read it.
        tokens: The number of latent tokens of one sample, for a resolution-dependent shift if the pipeline passes no
            mu.
        noise: The noise for a step's key, in place of the pipeline's generators. If the pipeline holds its state twice,
            the noise is repeated.
    """

    def __init__(
        self,
        scheduler: NoiseScheduler,
        config: Mapping[str, object] | None = None,
        tokens: int | None = None,
        noise: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.scheduler, self.tokens, self.noise = scheduler, tokens, noise
        self.config = ConfigDict(
            {"num_train_timesteps": 1000, "steps_offset": 1, "clip_sample": False, **(config or {})}
        )
        self._grid: Grid | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a request.

        Args:
            num_inference_steps: The number of steps, if no sigmas are given.
            device: The device of `timesteps`.
            sigmas: A flow's unshifted sigmas, in place of even ones.
            mu: The mu of the resolution, for a resolution-dependent shift.

        Raises:
            ValueError: The spacing does not use an argument, or the arguments give no number of steps.
        """
        steps = len(sigmas) if sigmas is not None else num_inference_steps
        if steps is None or (num_inference_steps is not None and num_inference_steps != steps):
            raise ValueError(f"num_inference_steps={num_inference_steps} with {steps} sigmas; give one of them")
        grid = self._spacing(sigmas, mu).grid(self.scheduler.path, steps)
        points = evaluation_points(self.scheduler, grid)
        if points[0][0] != grid[0]:
            raise ValueError("this solver moves off the first row before its first evaluation; lower its s_tmax")
        self._grid, self._points = grid, [point for step in points for point in step]
        self.order = math.ceil(len(self._points) / steps)
        self.num_inference_steps = steps
        self.timesteps = torch.tensor([p.tau for p in self._points], dtype=torch.float32, device=device)
        self.sigmas = grid.sigma.to(torch.float32)
        self._solver_state, self._i, self._index = SolverState(), 0, 0
        self._outputs: list[Tensor] = []
        self._sampled_noise: dict[int, Tensor] = {}
        self._x: Tensor | None = None
        self._requested_state: Tensor | None = None

    def _spacing(self, sigmas: list[float] | None, mu: float | None) -> Spacing:
        def change(inner: Spacing) -> Spacing:
            if mu is not None:
                if not isinstance(inner, ResolutionShift):
                    raise ValueError("mu is given, and this spacing's shift does not depend on it; leave it out")
                inner = inner.with_mu(mu)
            if sigmas is not None:
                if not isinstance(inner, FlowLinspace | ResolutionShift):
                    raise ValueError("sigmas are given, and this spacing makes its own; give num_inference_steps")
                given = tuple(float(s) for s in sigmas)
                if isinstance(inner, FlowLinspace):
                    return replace(inner, unshifted_sigmas=given)
                return replace(inner, flow=replace(inner.flow, unshifted_sigmas=given))
            return inner

        spacing = replace_innermost(self.scheduler.spacing, change)
        return spacing if self.tokens is None or mu is not None else for_tokens(spacing, self.tokens)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Raise ValueError for another start than 0: a multistep solver would lack the steps before."""
        if begin_index != 0:
            raise ValueError(f"begin_index={begin_index}; use 0, since sampling starts at the first row here")

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the first noise."""
        return self._require_grid().init_std

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Return the network's input at the next evaluation; sample may be doubled for guidance."""
        self._require_grid()
        return sample * self._points[self._next_index(timestep)].c_in

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Take the network's output at the next evaluation.

        Args:
            model_output: The network's output.
            timestep: The timestep of the evaluation, for a check.
            sample: The state at the evaluation.
            generator: The source of the noise.
            return_dict: Whether the result is a StepOutput instead of a pair.

        Returns:
            The state of the following evaluation, in model_output's dtype, and the estimate of x0.

        Raises:
            ValueError: The timestep is out of order, the request is finished, or the state was changed inside a solver
                step.
        """
        self._next_index(timestep)
        grid, point = self._require_grid(), self._points[self._index]
        self._accept_state(sample, point, grid)
        self._outputs.append(model_output)
        x0 = self.scheduler.prediction.estimate(model_output, at_least_float32(sample), point).x0
        self._requested_state = self._replay(grid, generator)
        self._index += 1
        prev = self._requested_state.to(model_output.dtype)
        return StepOutput(prev, x0) if return_dict else (prev, x0)

    def _accept_state(self, sample: Tensor, point: Point, grid: Grid) -> None:
        """Take the pipeline's state; keep the internal one if the two are equal except for the dtype."""
        if self._requested_state is not None and torch.equal(self._requested_state.to(sample.dtype), sample):
            return
        if self._outputs or point != grid[self._i]:
            raise ValueError("the state was changed inside a step of the solver; change it between steps")
        self._x = at_least_float32(sample)

    def _replay(self, grid: Grid, generator: Generators) -> Tensor:
        """Return the state of the next evaluation, or the final state; completed steps are stored."""
        while self._i < grid.steps:
            assert self._x is not None  # set by the first step
            state, remaining = self._solver_state.copy(), iter(list(self._outputs))

            def denoise(x: Tensor, point: Point, remaining=remaining) -> Estimate:  # type: ignore[no-untyped-def]
                output = next(remaining, None)
                if output is None:
                    raise _EvaluationRequest(x, point)
                return self.scheduler.prediction.estimate(output, x, point)

            def noise(key: int) -> Tensor:
                return self._noise_for(key, generator)

            try:
                self._x = self.scheduler.solver.step(self._x, self._i, grid, denoise, state, noise)
            except _EvaluationRequest as request:
                return request.x
            self._solver_state, self._i = state, self._i + 1
            self._outputs, self._sampled_noise = [], {}
        assert self._x is not None
        return self._x

    def _noise_for(self, key: int, generator: Generators) -> Tensor:
        """Return the noise of a key, sampled once per solver step on the generator's device."""
        assert self._x is not None
        if key not in self._sampled_noise and self.noise is not None:
            given = self.noise(key).to(self._x)
            self._sampled_noise[key] = torch.cat([given] * (len(self._x) // len(given)))
        if key not in self._sampled_noise:
            shape, generators = self._x.shape, generator if isinstance(generator, list) else [generator]
            rows = shape[0] // len(generators)
            parts = [
                torch.randn((rows, *shape[1:]), generator=g, device="cpu" if g is None else g.device)
                for g in generators
            ]
            self._sampled_noise[key] = torch.cat(parts).to(self._x.device)
        return self._sampled_noise[key]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return alpha * x0 + sigma * noise at the given timesteps.

        Args:
            original_samples: The clean data x0, shape (batch, ...).
            noise: Standard normal noise, shaped like original_samples.
            timesteps: Timesteps of this request, shape (batch,) or ().

        Returns:
            The noisy state, shaped like original_samples.

        Raises:
            ValueError: A timestep is not one of this request's.
        """
        self._require_grid()
        points = []
        for t in timesteps.reshape(-1).tolist():
            nearest = min(self._points, key=lambda p: abs(p.tau - t))
            if abs(nearest.tau - t) > 1e-3 * max(1.0, abs(t)):
                raise ValueError(f"timestep {t} is not one of this request's {self.num_inference_steps} steps")
            points.append(nearest)
        shape = (-1, *(1,) * (original_samples.ndim - 1))
        alpha, sigma = (
            original_samples.new_tensor([getattr(p, name) for p in points]).reshape(shape)
            for name in ("alpha", "sigma")
        )
        return alpha * original_samples + sigma * noise

    def _require_grid(self) -> Grid:
        if self._grid is None:
            raise ValueError("call set_timesteps before anything else")
        return self._grid

    def _next_index(self, timestep: Tensor | float | None) -> int:
        """Return the index of the next evaluation, after checking that the pipeline is at the same one."""
        self._require_grid()
        if self._index == len(self._points):
            raise ValueError("this request is finished; call set_timesteps for the next")
        wanted = self._points[self._index].tau
        given = wanted if timestep is None else float(torch.as_tensor(timestep).reshape(-1)[0])
        if abs(given - wanted) > 1e-3 * max(1.0, abs(wanted)):
            raise ValueError(f"timestep {given:g} is out of order; the next evaluation is at {wanted:g}")
        return self._index
