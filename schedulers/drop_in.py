"""A NoiseScheduler in the vocabulary of diffusers: pipeline.scheduler = DiffusersView(noise_scheduler).

A solver here pulls: it calls the network itself. A pipeline pushes: it calls the network and hands the output to step.
The view bridges the two by replay. It keeps the outputs it was given for the solver's current step and runs that step
again from its start; when the solver asks for one more, the view stops there and hands the pipeline what it asked for.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from schedulers.conventions import for_tokens, innermost
from schedulers.grid import Grid, Point
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import Estimate
from schedulers.solvers.base import Memory
from schedulers.spacing import FlowLinspace, ResolutionShift, Spacing

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class StepOutput:
    """prev_sample is the state for the next evaluation, pred_original_sample the estimate of x0 at this one."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class Config(dict[str, object]):
    """A mapping whose keys are attributes too, as pipelines read a scheduler's config."""

    def __getattr__(self, name: str) -> object:
        if name not in self:
            raise AttributeError(f"this scheduler's config has no {name}")
        return self[name]


class _Asked(Exception):
    """The solver wants the network at a point, and no output is left to answer with."""

    def __init__(self, x: Tensor, point: Point) -> None:
        super().__init__()
        self.x, self.point = x, point


def evaluation_points(scheduler: NoiseScheduler, grid: Grid) -> list[list[Point]]:
    """Where the network is called, step by step, found by walking the solver over a state of one number.

    Raises ValueError for a solver that decides by the sample where it goes.
    """
    if scheduler.solver.evaluations(grid) is None:
        raise ValueError(
            f"{type(scheduler.solver).__name__} chooses its timesteps by the sample; diffusers asks for them first"
        )
    found: list[list[Point]] = []
    one, memory = torch.ones(1, 1, 1, 1, dtype=torch.float64), Memory()

    def denoise(x: Tensor, point: Point) -> Estimate:
        found[-1].append(point)
        return Estimate(one, one, one)

    for i in range(grid.steps):
        found.append([])
        scheduler.solver.step(one, i, grid, denoise, memory, lambda key: one)
    return found


class DiffusersView:
    """Shows a NoiseScheduler as diffusers' pipelines expect one.

    It holds the state of one request, as diffusers' own objects do: use one view per pipeline, and one request at a
    time; the NoiseScheduler inside stays shared. Inside, the state is float32 whatever the pipeline's dtype, as long as
    the pipeline hands back what it was given. config is shown to the pipeline and not read. tokens, of one picture,
    decides a resolution-dependent shift where the pipeline passes no mu. noise, of a step's key, takes the place of
    what the pipeline's generators would give; where the pipeline holds its state twice, so is the noise. Steps start at
    the first row only.
    """

    def __init__(
        self,
        scheduler: NoiseScheduler,
        config: Mapping[str, object] | None = None,
        tokens: int | None = None,
        noise: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.scheduler, self.tokens, self.noise = scheduler, tokens, noise
        self.config = Config({"num_train_timesteps": 1000, "steps_offset": 1, "clip_sample": False, **(config or {})})
        self._grid: Grid | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a request. sigmas are a flow's unshifted ones in place of even ones, mu the shift of a picture's size.

        Raises ValueError where the spacing has no use for what is given, or no number of steps follows.
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
        self._memory, self._i, self._index = Memory(), 0, 0
        self._outputs: list[Tensor] = []
        self._drawn: dict[int, Tensor] = {}
        self._x: Tensor | None = None
        self._asked: Tensor | None = None

    def _spacing(self, sigmas: list[float] | None, mu: float | None) -> Spacing:
        def change(inner: Spacing) -> Spacing:
            if mu is not None:
                if not isinstance(inner, ResolutionShift):
                    raise ValueError("mu is given, and this spacing's shift does not depend on it; leave it out")
                inner = inner.shifted(mu)
            if sigmas is not None:
                if not isinstance(inner, FlowLinspace | ResolutionShift):
                    raise ValueError("sigmas are given, and this spacing makes its own; give num_inference_steps")
                given = tuple(float(s) for s in sigmas)
                if isinstance(inner, FlowLinspace):
                    return replace(inner, given=given)
                return replace(inner, flow=replace(inner.flow, given=given))
            return inner

        spacing = innermost(self.scheduler.spacing, change)
        return spacing if self.tokens is None or mu is not None else for_tokens(spacing, self.tokens)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Raises ValueError for another start than 0: a multistep solver would lack the steps before."""
        if begin_index != 0:
            raise ValueError(f"begin_index={begin_index}; sampling starts at the first row here")

    @property
    def init_noise_sigma(self) -> float:
        """The deviation of the first noise."""
        return self._begun().init_std

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """What the network is fed at the next evaluation; sample may be doubled for guidance."""
        self._begun()
        return sample * self._points[self._expected(timestep)].c_in

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Take the output at the next evaluation. The first of the pair, in model_output's dtype, is where the next is.

        Raises ValueError for a timestep out of order, a finished request, or a state that was changed where the solver
        cannot take it up.
        """
        self._expected(timestep)
        grid, point = self._begun(), self._points[self._index]
        self._take_up(sample, point, grid)
        self._outputs.append(model_output)
        x0 = self.scheduler.prediction.estimate(model_output, _state(sample), point).x0
        self._asked = self._replay(grid, generator)
        self._index += 1
        prev = self._asked.to(model_output.dtype)
        return StepOutput(prev, x0) if return_dict else (prev, x0)

    def _take_up(self, sample: Tensor, point: Point, grid: Grid) -> None:
        """The state as the pipeline holds it; ours where it is the same but for the dtype."""
        if self._asked is not None and torch.equal(self._asked.to(sample.dtype), sample):
            return
        if self._outputs or point != grid[self._i]:
            raise ValueError("the state was changed inside a step of the solver; change it between steps")
        self._x = _state(sample)

    def _replay(self, grid: Grid, generator: Generators) -> Tensor:
        """Where the solver asks next, or the final state; completed steps are kept."""
        while self._i < grid.steps:
            assert self._x is not None  # set by the first step
            memory, answers = self._memory.copy(), iter(list(self._outputs))

            def denoise(x: Tensor, point: Point, answers=answers) -> Estimate:  # type: ignore[no-untyped-def]
                output = next(answers, None)
                if output is None:
                    raise _Asked(x, point)
                return self.scheduler.prediction.estimate(output, x, point)

            def noise(key: int) -> Tensor:
                return self._draw(key, generator)

            try:
                self._x = self.scheduler.solver.step(self._x, self._i, grid, denoise, memory, noise)
            except _Asked as asked:
                return asked.x
            self._memory, self._i = memory, self._i + 1
            self._outputs, self._drawn = [], {}
        assert self._x is not None
        return self._x

    def _draw(self, key: int, generator: Generators) -> Tensor:
        """The noise of a key, drawn once a step of the solver, on the generator's device."""
        assert self._x is not None
        if key not in self._drawn and self.noise is not None:
            given = self.noise(key).to(self._x)
            self._drawn[key] = torch.cat([given] * (len(self._x) // len(given)))
        if key not in self._drawn:
            shape, several = self._x.shape, generator if isinstance(generator, list) else [generator]
            rows = shape[0] // len(several)
            parts = [
                torch.randn((rows, *shape[1:]), generator=g, device="cpu" if g is None else g.device) for g in several
            ]
            self._drawn[key] = torch.cat(parts).to(self._x.device)
        return self._drawn[key]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha * x0 + sigma * noise at timesteps, each one of `timesteps`; shape (batch,) or ().

        Raises ValueError for another timestep.
        """
        self._begun()
        points = []
        for t in timesteps.reshape(-1).tolist():
            near = min(self._points, key=lambda p: abs(p.tau - t))
            if abs(near.tau - t) > 1e-3 * max(1.0, abs(t)):
                raise ValueError(f"timestep {t} is not one of this request's {self.num_inference_steps} steps")
            points.append(near)
        shape = (-1, *(1,) * (original_samples.ndim - 1))
        alpha, sigma = (
            original_samples.new_tensor([getattr(p, name) for p in points]).reshape(shape)
            for name in ("alpha", "sigma")
        )
        return alpha * original_samples + sigma * noise

    def _begun(self) -> Grid:
        if self._grid is None:
            raise ValueError("call set_timesteps before anything else")
        return self._grid

    def _expected(self, timestep: Tensor | float | None) -> int:
        """The index of the next evaluation, once it is known that the pipeline is there too."""
        self._begun()
        if self._index == len(self._points):
            raise ValueError("this request is finished; call set_timesteps for the next")
        wanted = self._points[self._index].tau
        told = wanted if timestep is None else float(torch.as_tensor(timestep).reshape(-1)[0])
        if abs(told - wanted) > 1e-3 * max(1.0, abs(wanted)):
            raise ValueError(f"timestep {told:g} is out of order; the next evaluation is at {wanted:g}")
        return self._index


def _state(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)
