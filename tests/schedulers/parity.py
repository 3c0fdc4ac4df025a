"""Whole trajectories of diffusers' classes and of their counterparts, side by side on a toy network.

Each case runs twice: as published, in float32, and with every float32 of diffusers' module read as float64, which tells
a difference of rounding from a difference of formulas.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from schedulers.grid import Grid, Point
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import Estimate
from schedulers.published import from_diffusers

SHAPE = (2, 4, 6, 6)


class Widened:
    """A library as a module sees it, with float64 under the name of float32."""

    def __init__(self, library: types.ModuleType) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, "float64" if name == "float32" else name)


@dataclass(frozen=True)
class Case:
    """One configuration of one class."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    set_timesteps: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    most: int = 1000

    def __str__(self) -> str:
        shown = {k: "..." if isinstance(v, list) else v for k, v in self.options.items()}
        return "-".join([self.name, *(f"{k}={v}" for k, v in shown.items())])

    def ours(self) -> NoiseScheduler:
        """The counterpart, from the configuration alone."""
        return from_diffusers({"_class_name": self.name, **self.options})


@dataclass
class Toy:
    """A fixed smooth network (x, tau) -> output, with as many channels again for a learned variance; notes each tau."""

    variance: str = ""
    told: list[float] = field(default_factory=list)

    def __call__(self, x: Tensor, tau: float) -> Tensor:
        self.told.append(float(tau))
        mixed = x.roll(1, 1) - 0.5 * x.roll(1, 2) + 0.3 * x.roll(-1, 3)
        out = torch.tanh(0.7 * x + 0.3 * mixed + float(tau) / 2000)
        if self.variance not in ("learned", "learned_range"):
            return out
        raw = 0.8 * torch.sin(3 * out)
        return torch.cat([out, raw if self.variance == "learned_range" else 0.01 * (1 + raw)], dim=1)


def draw(i: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The noise of key i, the same numbers in either precision; -1 is where sampling starts."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(101 + i), dtype=torch.float32).to(dtype)


def module_of(name: str) -> types.ModuleType:
    """The module of a class; torchsde gets an empty stand-in where one wants it, as its noise is replaced."""
    import diffusers

    if name == "CosineDPMSolverMultistepScheduler":
        with mock.patch.dict(sys.modules, {"torchsde": sys.modules.get("torchsde", types.ModuleType("torchsde"))}):
            return importlib.import_module("diffusers.schedulers.scheduling_cosine_dpmsolver_multistep")
    if name == "ScoreSdeVpScheduler":
        return importlib.import_module("diffusers.schedulers.deprecated.scheduling_sde_vp")
    return importlib.import_module(getattr(diffusers, name).__module__)


@contextlib.contextmanager
def published(case: Case, wide: bool, step: list[int]) -> Iterator[Any]:
    """diffusers' own object; what it draws is draw(step[0]). wide reads its float32 as float64 inside the context."""
    module = module_of(case.name)
    cls = getattr(module, case.name)

    def randn(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return draw(step[0], torch.float64 if wide else dtype or torch.float32)

    with contextlib.ExitStack() as stack:
        if hasattr(module, "randn_tensor"):
            stack.enter_context(mock.patch.object(module, "randn_tensor", randn))
        if wide:
            stack.enter_context(mock.patch.object(module, "torch", Widened(torch)))
            if hasattr(module, "np"):
                stack.enter_context(mock.patch.object(module, "np", Widened(np)))
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
        cut = cls.set_timesteps
        with mock.patch.object(cls, "set_timesteps", lambda self, steps, *a, **k: cut(self, min(steps, 2))):
            other = cls.from_config(dict(case.options))  # some constructors cut 1000 steps, which takes half a second
        yield other


def theirs(other: Any, case: Case, steps: int, network: Toy, step: list[int], wide: bool = False) -> Tensor:
    """diffusers' own loop; step[0] tells `published` which noise is drawn."""
    other.set_timesteps(steps, **case.set_timesteps)
    x = draw(-1, torch.float64 if wide else torch.float32) * getattr(other, "init_noise_sigma", 1.0)
    if case.name in LOOPS:
        return LOOPS[case.name](other, x, network, step)
    other.noise_sampler = lambda *sigmas: draw(step[0], x.dtype)
    for j, t in enumerate(other.timesteps):
        step[0] = j // 2 if case.name.startswith("KDPM2") else j
        fed = other.scale_model_input(x, t) if hasattr(other, "scale_model_input") else x
        x = other.step(network(fed, t.item()), t, x).prev_sample
    return x


def _score_ve(other: Any, x: Tensor, network: Toy, step: list[int]) -> Tensor:
    """As in diffusers' ScoreSdeVePipeline, which ends at the mean."""
    steps, mean = len(other.timesteps), x
    other.set_sigmas(steps)
    for i, t in enumerate(other.timesteps):
        for k in range(other.config.correct_steps):
            step[0] = i + (k + 1) * steps
            x = other.step_correct(network(x, other.sigmas[i].item()), x).prev_sample
        step[0] = i
        moved = other.step_pred(network(x, other.sigmas[i].item()), t, x)
        x, mean = moved.prev_sample, moved.prev_sample_mean
    return mean


def _score_vp(other: Any, x: Tensor, network: Toy, step: list[int]) -> Tensor:
    for i, t in enumerate(other.timesteps):
        step[0] = i
        x, _ = other.step_pred(network(x, 999 * t.item()), x, t)
    return x


LOOPS: dict[str, Callable[[Any, Tensor, Toy, list[int]], Tensor]] = {
    "ScoreSdeVeScheduler": _score_ve,
    "ScoreSdeVpScheduler": _score_vp,
}


def ours(case: Case, steps: int, network: Toy, wide: bool = False) -> tuple[Tensor, Grid]:
    """Our loop, and the grid it walked."""
    scheduler = case.ours()
    grid = scheduler.grid(steps, case.tokens)

    def denoise(x: Tensor, point: Point) -> Estimate:
        return scheduler.prediction.estimate(network(point.c_in * x, point.tau), x, point)

    start = scheduler.init_noise(draw(-1, torch.float64 if wide else torch.float32), grid)
    return scheduler.sample(start, grid, denoise, draw), grid


def table(other: Any, case: Case, steps: int) -> Tensor:
    """diffusers' sigma / alpha at each row, on a flow sigma itself: float64 of shape (steps + 1,)."""
    if case.name == "ScoreSdeVeScheduler":
        other.set_sigmas(steps)
        return torch.cat([other.discrete_sigmas.flip(0), torch.zeros(1)]).double()
    if "sigmas" in vars(other) and case.name != "ScoreSdeVpScheduler":
        doubled = case.name.startswith(("Heun", "KDPM2", "FlowMatchHeun"))  # two evaluations a row
        return (torch.cat([other.sigmas[:1], other.sigmas[1::2][:steps]]) if doubled else other.sigmas).double()
    rows = other._timesteps[::-1].copy() if case.name == "PNDMScheduler" else other.timesteps.numpy()
    last = torch.ones(1)
    if case.name.startswith(("DDIM", "PNDM")):
        last = other.final_alpha_cumprod.reshape(1)
    if case.name.startswith("TCD"):
        last = other.alphas_cumprod[:1]
    alpha_bar = torch.cat([other.alphas_cumprod[rows.astype(int)], last]).double()
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def told(other: Any, case: Case) -> Tensor:
    """What diffusers tells the network at each evaluation."""
    if case.name == "ScoreSdeVeScheduler":
        return other.sigmas.repeat_interleave(other.config.correct_steps + 1).double()
    return other.timesteps.double() * (999 if case.name == "ScoreSdeVpScheduler" else 1)


@dataclass(frozen=True)
class Difference:
    """Of the final states, over the largest value, and of what the networks were told, over at least 1."""

    steps: int
    state: float
    told: float


def compare(case: Case, several: tuple[int, ...], wide: bool, mine: Case | None = None) -> list[Difference]:
    """The differences at each of several numbers of steps; mine takes the place of the case's own counterpart."""
    found, step = [], [0]
    for steps in several:
        with published(case, wide, step) as other:
            network = Toy(case.options.get("variance_type", "")), Toy(case.options.get("variance_type", ""))
            wanted = theirs(other, case, steps, network[0], step, wide)
            got, _ = ours(mine or case, steps, network[1], wide)
            a, b = network[0].told, network[1].told
            assert len(a) == len(b), f"{case}: {len(b)} evaluations, diffusers has {len(a)}"
            assert got.dtype == wanted.dtype == (torch.float64 if wide else torch.float32)
            assert wanted.abs().max() > 0.05
            told = max(abs(u - v) / max(abs(u), 1.0) for u, v in zip(a, b, strict=True))
            found.append(Difference(steps, ((got - wanted).abs().max() / wanted.abs().max()).item(), told))
    return found
