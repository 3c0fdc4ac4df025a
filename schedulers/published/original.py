"""diffusers' own scheduler classes in float64, with given noise, on a fixed small network.

A class comes from a private copy of diffusers' module, in which float32 means float64 and the noise is given. Nothing
of diffusers itself is changed. What then differs from the parts of this package is a formula, not a rounding.
"""

import functools
import importlib.util
import inspect
import math
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from schedulers.grid import Grid, Point
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import Estimate, LearnedVariance

SHAPE = (2, 3, 6, 6)
FACTORIES = ("arange", "empty", "full", "linspace", "logspace", "ones", "tensor", "zeros")
MOVED = {
    "CosineDPMSolverMultistepScheduler": "diffusers.schedulers.scheduling_cosine_dpmsolver_multistep",
    "ScoreSdeVpScheduler": "diffusers.schedulers.deprecated.scheduling_sde_vp",
}
"""Classes that diffusers does not export, or only with another package installed."""


class Widened:
    """A library as a module sees it: float32 is float64, also where a new tensor has no dtype."""

    def __init__(self, library: types.ModuleType) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.library, "float64" if name == "float32" else name)
        return _widened(value) if self.library is torch and name in FACTORIES else value


def _widened(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        made = factory(*args, **kwargs)
        if made.dtype == torch.float32 and kwargs.get("dtype") is None:
            made = factory(*args, **{**kwargs, "dtype": torch.float64})
        return made

    return make


@functools.cache
def sample_noise(key: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the noise of a step's key, of shape SHAPE, the same numbers in either precision; -1 is the first noise."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(101 + key), dtype=torch.float32).to(dtype)


@dataclass
class NoiseKey:
    """Which noise a class gets next: that of a step's key, in float64.

    Attributes:
        key: The key.
    """

    key: int = 0

    def noise(self) -> Tensor:
        """Return the noise of the key."""
        return sample_noise(self.key, torch.float64)


def new_scheduler(name: str, config: Mapping[str, object], noise: Callable[[], Tensor], double: bool = True) -> Any:
    """Return an object of a private copy of diffusers' class.

    Args:
        name: The name of the class.
        config: The options of scheduler_config.json; missing ones have diffusers' defaults.
        noise: A function that returns the next noise.
        double: Whether float32 means float64.

    Returns:
        The object, with diffusers' methods.
    """
    module = _copy(name)
    if double:
        module.__dict__.update({key: Widened(vars(module)[key]) for key in ("torch", "np") if key in vars(module)})
    if "randn_tensor" in vars(module):
        module.__dict__["randn_tensor"] = lambda *args, **kwargs: noise()
    cls = getattr(module, name)
    set_timesteps = cls.set_timesteps
    declared = inspect.signature(cls.__init__).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls.set_timesteps = lambda self, steps, *args, **kwargs: set_timesteps(self, min(steps, 2))
        made = cls(**{key: value for key, value in config.items() if key in declared})  # some make 1000 steps here
        cls.set_timesteps = set_timesteps
    made.register_to_config(**{key: value for key, value in config.items() if key not in declared})
    return made


def _copy(name: str) -> types.ModuleType:
    """Return a new module with the code of the one that defines a class; Python's own list of modules lacks it."""
    import diffusers

    path = MOVED.get(name) or getattr(diffusers, name).__module__
    spec = importlib.util.find_spec(path)
    if spec is None or spec.loader is None:
        raise ImportError(f"diffusers has no module {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class SamplingTrace:
    """What a fixed smooth network is given, and where sampling ends.

    Attributes:
        variance: The second half of the channels: "learned" or "learned_range" variance; none for any other text.
        inputs: The network's input at each evaluation.
        timesteps: The network's time at each evaluation.
        final: The last state; empty before sampling.
    """

    variance: str = ""
    inputs: list[Tensor] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    final: Tensor = field(default_factory=lambda: torch.empty(0))

    def network(self, x: Tensor, tau: float) -> Tensor:
        """Return an output of x's shape, or with twice its channels, and keep what it was given."""
        self.inputs.append(x)
        self.timesteps.append(float(tau))
        mixed = x.roll(1, 1) - 0.5 * x.roll(1, 2) + 0.3 * x.roll(-1, 3)
        out = torch.tanh(0.7 * x + 0.3 * mixed + float(tau) / 2000)
        if self.variance not in ("learned", "learned_range"):
            return out
        raw = 0.8 * torch.sin(3 * out)
        return torch.cat([out, raw if self.variance == "learned_range" else 0.01 * (1 + raw)], dim=1)


def trace_ours(scheduler: NoiseScheduler, grid: Grid, start: Tensor, variance: str = "") -> SamplingTrace:
    """Return the trace of a noise scheduler from the state `start` at the first row.

    Args:
        scheduler: The noise scheduler.
        grid: The points of the noise scheduler.
        start: The first state.
        variance: The variance that the network outputs, as in SamplingTrace.

    Returns:
        The trace.
    """
    doubled = isinstance(scheduler.prediction, LearnedVariance)
    trace = SamplingTrace((variance if variance == "learned" else "learned_range") if doubled else "")

    def denoise(x: Tensor, point: Point) -> Estimate:
        return scheduler.prediction.estimate(trace.network(point.c_in * x, point.tau), x, point)

    trace.final = scheduler.sample(start, grid, denoise, sample_noise)
    return trace


def trace_theirs(made: Any, name: str, start: Tensor, clock: NoiseKey, options: Mapping[str, object]) -> SamplingTrace:
    """Return the trace of an object of diffusers whose timesteps are set.

    Args:
        made: The object.
        name: The name of the object's class.
        start: The first state.
        clock: The key of the object's next noise.
        options: More arguments of its step.

    Returns:
        The trace.
    """
    trace = SamplingTrace(str(made.config.get("variance_type") or ""))
    loop = {"ScoreSdeVeScheduler": _score_ve, "ScoreSdeVpScheduler": _score_vp}.get(name)
    if loop is not None:
        trace.final = loop(made, start, trace, clock)
        return trace
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(0)  # else the first timestep is searched for among those of a table
    made.noise_sampler = lambda *sigmas: clock.noise()  # the cosine class's Brownian noise
    x = start
    for i, t in enumerate(made.timesteps):
        clock.key = i // 2 if name.startswith("KDPM2") else i
        fed = made.scale_model_input(x, t) if hasattr(made, "scale_model_input") else x
        x = made.step(trace.network(fed, t.item()), t, x, **options).prev_sample
    trace.final = x
    return trace


def _score_ve(made: Any, x: Tensor, trace: SamplingTrace, clock: NoiseKey) -> Tensor:
    """Run the loop of diffusers' ScoreSdeVePipeline, which ends at the mean."""
    steps, mean = len(made.timesteps), x
    made.set_sigmas(steps)
    for i, t in enumerate(made.timesteps):
        for k in range(made.config.correct_steps):
            clock.key = i + (k + 1) * steps
            x = made.step_correct(trace.network(x, made.sigmas[i].item()), x).prev_sample
        clock.key = i
        moved = made.step_pred(trace.network(x, made.sigmas[i].item()), t, x)
        x, mean = moved.prev_sample, moved.prev_sample_mean
    return mean


def _score_vp(made: Any, x: Tensor, trace: SamplingTrace, clock: NoiseKey) -> Tensor:
    for i, t in enumerate(made.timesteps):
        clock.key = i
        x, _ = made.step_pred(trace.network(x, 999 * t.item()), x, t)
    return x


def differences(ours: SamplingTrace, theirs: SamplingTrace) -> Iterator[tuple[float, str]]:
    """Yield the relative difference of each input, each timestep and the final state, and what it is of.

    A missing evaluation counts as 1, all of it.

    Args:
        ours: The trace of a noise scheduler.
        theirs: The trace of diffusers' class.

    Yields:
        A relative difference, and its place.
    """
    for i in range(max(len(ours.inputs), len(theirs.inputs))):
        if i >= min(len(ours.inputs), len(theirs.inputs)):
            yield 1.0, f"evaluation {i + 1}, which only one of the two makes"
            continue
        yield relative_l2(ours.inputs[i], theirs.inputs[i]), f"the network's input at evaluation {i + 1}"
        a, b = ours.timesteps[i], theirs.timesteps[i]
        yield _finite(abs(a - b) / max(abs(b), 1.0)), f"the network's timestep at evaluation {i + 1}"
    yield relative_l2(ours.final, theirs.final), "the final state"


def relative_l2(ours: Tensor, theirs: Tensor) -> float:
    """Return |ours - theirs| / |theirs|; a state that is not finite gives infinity."""
    a, b = ours.double(), theirs.double()
    return _finite((torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp(min=1e-12)).item())


def _finite(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference
