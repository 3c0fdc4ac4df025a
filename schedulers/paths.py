"""Gaussian noise paths: alpha(t) and sigma(t) of x = alpha * x0 + sigma * eps, and what the network is told at t.

Methods take a Python float or a tensor, work elementwise in float64, and give back what they were given: a float, or
a tensor of the same shape, device and floating dtype (integer tensors give the default dtype).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

Scalar = TypeVar("Scalar", float, Tensor)
TauMap = Literal["log_sigma", "flow_time", "sigma"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos"]


class NoisePath(Protocol):
    """A Gaussian path; t grows from data (t_min) to noise (t_max), and sigma / alpha grows with it."""

    @property
    def t_min(self) -> float:
        """The time nearest to the data that a network was trained on."""

    @property
    def t_max(self) -> float:
        """The time of the noisiest state that a network was trained on."""

    def alpha(self, t: Scalar) -> Scalar:
        """The factor of the data."""

    def sigma(self, t: Scalar) -> Scalar:
        """The factor of the noise."""

    def tau(self, t: Scalar) -> Scalar:
        """The number the network is told."""

    def c_in(self, t: Scalar) -> Scalar:
        """The factor of the state on its way into the network."""

    def t_of(self, ratio: Scalar) -> Scalar:
        """The time at which sigma / alpha equals `ratio`; a ratio outside the path gives its nearest end."""

    def init_std(self, t: float) -> float:
        """The standard deviation of the pure noise that sampling starts from at t."""


def _elementwise(f: Callable[[Tensor], Tensor], t: Scalar) -> Scalar:
    """Apply f in float64 and return the kind of number that came in."""
    if isinstance(t, Tensor):
        dtype = t.dtype if t.is_floating_point() else torch.get_default_dtype()
        return f(t.to(torch.float64, copy=True)).to(dtype)  # a copy, so that sigma = t never aliases t
    return float(f(torch.tensor(t, dtype=torch.float64)))


@dataclass(frozen=True)
class FlowPath:
    """Rectified flow: alpha = 1 - t, sigma = t, tau = time_scale * t, t in [0, 1].

    Liu et al. 2022 (arXiv 2209.03003) equation 1 and Lipman et al. 2022 (arXiv 2210.02747), with t = 1 the noise as
    in SD3 and FLUX.
    """

    time_scale: float = 1000.0
    t_min: float = 0.0
    t_max: float = 1.0

    def alpha(self, t: Scalar) -> Scalar:
        """1 - t."""
        return _elementwise(lambda s: 1 - s, t)

    def sigma(self, t: Scalar) -> Scalar:
        """t."""
        return _elementwise(lambda s: s, t)

    def tau(self, t: Scalar) -> Scalar:
        """time_scale * t."""
        return _elementwise(lambda s: self.time_scale * s, t)

    def c_in(self, t: Scalar) -> Scalar:
        """1."""
        return _elementwise(torch.ones_like, t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """ratio / (1 + ratio); an infinite ratio gives 1."""
        return _elementwise(lambda r: 1 / (1 + 1 / r), ratio)

    def init_std(self, t: float) -> float:
        """sigma(t), which is 1 at t = 1."""
        return self.sigma(t)


@dataclass(frozen=True)
class EDMPath:
    """Variance exploding in EDM's time: alpha = 1, sigma = t, c_in = 1 / sqrt(sigma^2 + sigma_data^2).

    Karras et al. 2022 (arXiv 2206.00364), table 1. What the network is told is the checkpoint's choice: "log_sigma" is
    log(sigma) / 4 (EDM), "sigma" is sigma itself (NCSN++), and "flow_time" is 1000 sigma / (1 + sigma), the time of a
    rectified flow at the same sigma / alpha. tau at sigma = 0 is finite; no network is called there.
    """

    sigma_data: float = 0.5
    tau_map: TauMap = "log_sigma"
    t_min: float = 0.002
    t_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.t_min < self.t_max:
            raise ValueError(f"EDMPath needs 0 < t_min < t_max, got {self.t_min} and {self.t_max}")
        if self.sigma_data <= 0:
            raise ValueError(f"sigma_data={self.sigma_data}; give the standard deviation of the data, above 0")

    def alpha(self, t: Scalar) -> Scalar:
        """1."""
        return _elementwise(torch.ones_like, t)

    def sigma(self, t: Scalar) -> Scalar:
        """t."""
        return _elementwise(lambda s: s, t)

    def tau(self, t: Scalar) -> Scalar:
        """log(t) / 4, 1000 t / (1 + t) or t, by tau_map."""
        if self.tau_map == "log_sigma":
            return _elementwise(lambda s: s.clamp(min=1e-20).log() / 4, t)
        if self.tau_map == "flow_time":
            return _elementwise(lambda s: 1000 * s / (1 + s), t)
        return self.sigma(t)

    def c_in(self, t: Scalar) -> Scalar:
        """1 / sqrt(sigma^2 + sigma_data^2)."""
        return _elementwise(lambda s: (s**2 + self.sigma_data**2).rsqrt(), t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """ratio, since sigma / alpha = t."""
        return self.sigma(ratio)

    def init_std(self, t: float) -> float:
        """sigma(t), as in Algorithm 2 of the paper."""
        return self.sigma(t)


def betas(schedule: BetaSchedule, start: float = 1e-4, end: float = 0.02, steps: int = 1000) -> Tensor:
    """The training noise increments of a discrete path, float64 of shape (steps,).

    "linear" is Ho et al. 2020 (arXiv 2006.11239), section 4; "scaled_linear" is linear in the square root (Stable
    Diffusion); "squaredcos" is Nichol and Dhariwal 2021 (arXiv 2102.09672), equation 17, with betas capped at 0.999,
    and does not use start and end. Raises ValueError for another name.
    """
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
    if schedule == "squaredcos":
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(f"unknown beta schedule {schedule!r}; use linear, scaled_linear or squaredcos")


@dataclass(frozen=True, eq=False)
class DiscreteVPPath:
    """Variance preserving on N trained indices: alpha^2 = prod(1 - beta), sigma^2 = 1 - alpha^2, tau = t in [0, N - 1].

    Ho et al. 2020 (arXiv 2006.11239), equation 4. Between indices sigma / alpha is interpolated, in its logarithm by
    default ("log", as k-diffusion and DPM-Solver do) or directly ("linear", as diffusers' EulerDiscrete does for
    `linspace`). Raises ValueError when a beta is outside (0, 1) or fewer than two are given.
    """

    betas: Tensor
    interpolation: Literal["log", "linear"] = "log"

    def __post_init__(self) -> None:
        betas = self.betas.detach().to("cpu", torch.float64).clone()
        if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("DiscreteVPPath needs at least two betas, each inside (0, 1)")
        object.__setattr__(self, "betas", betas)

    @property
    def t_min(self) -> float:
        """Index 0."""
        return 0.0

    @property
    def t_max(self) -> float:
        """Index N - 1."""
        return float(len(self.betas) - 1)

    def _knots(self, device: torch.device) -> Tensor:
        """log(sigma / alpha) or sigma / alpha at the trained indices; expm1 keeps the digits of the first rows."""
        ratio = torch.expm1(-torch.log1p(-self.betas).cumsum(0)).sqrt()
        return (ratio.log() if self.interpolation == "log" else ratio).to(device)

    def _ratio(self, t: Tensor) -> Tensor:
        knots = self._knots(t.device)
        t = t.clamp(0, len(knots) - 1)
        low = t.floor().clamp(max=len(knots) - 2).long()
        value = torch.lerp(knots[low], knots[low + 1], t - low)
        return value.exp() if self.interpolation == "log" else value

    def alpha(self, t: Scalar) -> Scalar:
        """sqrt(alpha_bar) = 1 / sqrt(1 + ratio^2)."""
        return _elementwise(lambda s: (1 + self._ratio(s) ** 2).rsqrt(), t)

    def sigma(self, t: Scalar) -> Scalar:
        """sqrt(1 - alpha_bar) = ratio / sqrt(1 + ratio^2)."""
        return _elementwise(lambda s: (1 + self._ratio(s) ** -2).rsqrt(), t)

    def tau(self, t: Scalar) -> Scalar:
        """The index t itself."""
        return _elementwise(lambda s: s, t)

    def c_in(self, t: Scalar) -> Scalar:
        """1."""
        return _elementwise(torch.ones_like, t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """The inverse of the interpolation."""

        def inverse(r: Tensor) -> Tensor:
            knots = self._knots(r.device)
            value = (r.log() if self.interpolation == "log" else r).clamp(knots[0], knots[-1])
            high = torch.searchsorted(knots, value).clamp(1, len(knots) - 1)
            low = high - 1
            return low + (value - knots[low]) / (knots[high] - knots[low])

        return _elementwise(inverse, ratio)

    def init_std(self, t: float) -> float:
        """1, the standard deviation of the whole state for unit data."""
        return 1.0


@dataclass(frozen=True, eq=False)
class VECoordinates:
    """Another path seen in x / alpha: alpha = 1, sigma = the path's sigma / alpha, c_in = the path's alpha.

    The samplers of k-diffusion, and diffusers' Euler and Heun for discrete checkpoints, step in these coordinates.
    Most solvers give the same sample in both; Heun does not. Raises ValueError for a path that reaches alpha = 0.
    """

    path: NoisePath

    def __post_init__(self) -> None:
        if self.path.alpha(self.t_max) <= 0:
            raise ValueError("this path reaches alpha = 0, where sigma / alpha is infinite; use its own coordinates")

    @property
    def t_min(self) -> float:
        """The path's own."""
        return self.path.t_min

    @property
    def t_max(self) -> float:
        """The path's own."""
        return self.path.t_max

    def alpha(self, t: Scalar) -> Scalar:
        """1."""
        return _elementwise(torch.ones_like, t)

    def sigma(self, t: Scalar) -> Scalar:
        """The path's sigma / alpha."""
        return _elementwise(lambda s: self.path.sigma(s) / self.path.alpha(s), t)

    def tau(self, t: Scalar) -> Scalar:
        """The path's own."""
        return self.path.tau(t)

    def c_in(self, t: Scalar) -> Scalar:
        """The path's c_in * alpha, which brings the state back to what the network was trained on."""
        return _elementwise(lambda s: self.path.c_in(s) * self.path.alpha(s), t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """The path's own; the ratio does not depend on coordinates."""
        return self.path.t_of(ratio)

    def init_std(self, t: float) -> float:
        """The path's init_std / alpha."""
        return self.path.init_std(t) / self.path.alpha(t)
