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
TauMap = Literal["log_sigma", "flow_time", "sigma", "arctan"]
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

    def drift(self, t: Scalar) -> Scalar:
        """f = alpha'(t) / alpha(t) of the forward SDE dx = f x dt + g dw."""

    def diffusion(self, t: Scalar) -> Scalar:
        """g^2 = 2 sigma sigma' - 2 f sigma^2 = 2 sigma^2 d log(sigma / alpha) / dt of the forward SDE."""


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

    def drift(self, t: Scalar) -> Scalar:
        """-1 / (1 - t)."""
        return _elementwise(lambda s: -1 / (1 - s), t)

    def diffusion(self, t: Scalar) -> Scalar:
        """2 t / (1 - t)."""
        return _elementwise(lambda s: 2 * s / (1 - s), t)


@dataclass(frozen=True)
class EDMPath:
    """Variance exploding in EDM's time: alpha = 1, sigma = t, c_in = 1 / sqrt(sigma^2 + sigma_data^2).

    Karras et al. 2022 (arXiv 2206.00364), table 1. What the network is told is the checkpoint's choice: "log_sigma" is
    log(sigma) / 4 (EDM), "sigma" is sigma itself (NCSN++), "flow_time" is 1000 sigma / (1 + sigma), the time of a
    rectified flow at the same sigma / alpha, and "arctan" is 2 arctan(sigma) / pi (Stable Audio). tau at sigma = 0 is
    finite; no network is called there.
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
        """log(t) / 4, 1000 t / (1 + t), 2 arctan(t) / pi or t, by tau_map."""
        if self.tau_map == "log_sigma":
            return _elementwise(lambda s: s.clamp(min=1e-20).log() / 4, t)
        if self.tau_map == "flow_time":
            return _elementwise(lambda s: 1000 * s / (1 + s), t)
        if self.tau_map == "arctan":
            return _elementwise(lambda s: s.arctan() * (2 / math.pi), t)
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

    def drift(self, t: Scalar) -> Scalar:
        """0."""
        return _elementwise(torch.zeros_like, t)

    def diffusion(self, t: Scalar) -> Scalar:
        """2 t."""
        return _elementwise(lambda s: 2 * s, t)


@dataclass(frozen=True)
class GeometricVEPath:
    """Variance exploding: alpha = 1, sigma = sigma_min * (sigma_max / sigma_min)^t, t in [1e-5, 1], tau = sigma.

    Song et al. 2021 (arXiv 2011.13456), appendix C and D; NCSN++ with continuous training is told sigma. There is no
    point with sigma below sigma_min but the clean end of a grid.
    """

    sigma_min: float = 0.01
    sigma_max: float = 1348.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"GeometricVEPath needs 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Scalar) -> Scalar:
        """1."""
        return _elementwise(torch.ones_like, t)

    def sigma(self, t: Scalar) -> Scalar:
        """sigma_min * (sigma_max / sigma_min)^t."""
        return _elementwise(lambda s: self.sigma_min * (self._rate * s).exp(), t)

    def tau(self, t: Scalar) -> Scalar:
        """sigma(t)."""
        return self.sigma(t)

    def c_in(self, t: Scalar) -> Scalar:
        """1."""
        return _elementwise(torch.ones_like, t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """log(ratio / sigma_min) / log(sigma_max / sigma_min), at least 0."""
        return _elementwise(lambda r: (r / self.sigma_min).log().clamp(0, None) / self._rate, ratio)

    def init_std(self, t: float) -> float:
        """sigma(t)."""
        return self.sigma(t)

    def drift(self, t: Scalar) -> Scalar:
        """0."""
        return _elementwise(torch.zeros_like, t)

    def diffusion(self, t: Scalar) -> Scalar:
        """2 log(sigma_max / sigma_min) sigma^2."""
        return _elementwise(lambda s: 2 * self._rate * (self.sigma_min * (self._rate * s).exp()) ** 2, t)


@dataclass(frozen=True)
class ContinuousVPPath:
    """Variance preserving in continuous time: beta(t) = beta_min + t (beta_max - beta_min), B(t) its integral,

        VP      alpha = exp(-B / 2),    sigma = sqrt(1 - exp(-B))
        sub-VP  alpha = exp(-B / 2),    sigma = 1 - exp(-B),         tau = 999 t, t in [t_min, 1].

    Song et al. 2021 (arXiv 2011.13456), equations 29 and 30 (appendix B) and appendix C.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    sub: bool = False
    time_scale: float = 999.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min < self.beta_max or not 0 < self.t_min < self.t_max:
            raise ValueError(
                f"ContinuousVPPath needs 0 < beta_min < beta_max and 0 < t_min < t_max, got {self.beta_min}, "
                f"{self.beta_max}, {self.t_min} and {self.t_max}"
            )

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + (self.beta_max - self.beta_min) / 2 * t**2

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _sigma(self, t: Tensor) -> Tensor:
        variance = -torch.expm1(-self._integral(t))
        return variance if self.sub else variance.sqrt()

    def alpha(self, t: Scalar) -> Scalar:
        """exp(-B / 2)."""
        return _elementwise(lambda s: (-self._integral(s) / 2).exp(), t)

    def sigma(self, t: Scalar) -> Scalar:
        """See the class."""
        return _elementwise(self._sigma, t)

    def tau(self, t: Scalar) -> Scalar:
        """time_scale * t."""
        return _elementwise(lambda s: self.time_scale * s, t)

    def c_in(self, t: Scalar) -> Scalar:
        """1."""
        return _elementwise(torch.ones_like, t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """B from the ratio, then t from the quadratic B(t); at least 0, at most t_max."""

        def inverse(r: Tensor) -> Tensor:
            # VP: r^2 = e^B - 1. sub-VP: r = 2 sinh(B / 2).
            integral = 2 * torch.asinh(r / 2) if self.sub else torch.log1p(r**2)
            slope, curve = self.beta_min, (self.beta_max - self.beta_min) / 2
            t = 2 * integral / (slope + (slope**2 + 4 * curve * integral).sqrt())
            return torch.where(r.isinf(), torch.full_like(t, self.t_max), t).clamp(0, self.t_max)

        return _elementwise(inverse, ratio)

    def init_std(self, t: float) -> float:
        """1, the standard deviation of the prior."""
        return 1.0

    def drift(self, t: Scalar) -> Scalar:
        """-beta / 2."""
        return _elementwise(lambda s: -self._beta(s) / 2, t)

    def diffusion(self, t: Scalar) -> Scalar:
        """beta, and for sub-VP beta * (1 - exp(-2 B))."""

        def squared(s: Tensor) -> Tensor:
            return self._beta(s) * (-torch.expm1(-2 * self._integral(s)) if self.sub else 1.0)

        return _elementwise(squared, t)


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


def zero_terminal_snr(betas: Tensor, last_alpha_bar: float = 0.0) -> Tensor:
    """The same increments with sqrt(alpha-bar) shifted and scaled so that the last is pure noise, the first unchanged.

    Lin et al. 2023 (arXiv 2305.08891), Algorithm 1. last_alpha_bar replaces the 0 at the end where a sampler divides by
    alpha: diffusers' samplers in x / alpha use 2^-24. Shapes: (N,) to (N,), float64.
    """
    root = (1 - betas.double()).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    alpha_bar[-1] = last_alpha_bar
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


@dataclass(frozen=True, eq=False)
class DiscreteVPPath:
    """Variance preserving on N trained indices: alpha^2 = prod(1 - beta), sigma^2 = 1 - alpha^2, tau = t in [0, N - 1].

    Ho et al. 2020 (arXiv 2006.11239), equation 4. Between indices sigma / alpha is interpolated, in its logarithm by
    default ("log", as k-diffusion and DPM-Solver do) or directly ("linear", as diffusers' EulerDiscrete does for
    `linspace`). The last beta may be 1, which ends the path at pure noise (zero_terminal_snr). Raises ValueError when
    another beta is outside (0, 1) or fewer than two are given.
    """

    betas: Tensor
    interpolation: Literal["log", "linear"] = "log"

    def __post_init__(self) -> None:
        betas = self.betas.detach().to("cpu", torch.float64).clone()
        inside = (betas > 0) & (betas < 1)
        if betas.ndim != 1 or len(betas) < 2 or not inside[:-1].all() or not 0 < betas[-1] <= 1:
            raise ValueError("DiscreteVPPath needs at least two betas, each inside (0, 1); the last may be 1")
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
        share = t - low
        value = torch.lerp(knots[low], knots[low + 1], share)
        value = torch.where(share == 1, knots[low + 1], torch.where(share == 0, knots[low], value))
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
            share = (value - knots[low]) / (knots[high] - knots[low])
            return torch.where(value == knots[high], high.double(), low + share)

        return _elementwise(inverse, ratio)

    def init_std(self, t: float) -> float:
        """1, the standard deviation of the whole state for unit data."""
        return 1.0

    def _slope(self, t: Tensor) -> Tensor:
        """d log(sigma / alpha) / dt on the interval that ends at t, where a step towards the data begins."""
        knots = self._knots(t.device)
        high = t.clamp(0, len(knots) - 1).ceil().clamp(min=1).long()
        rise = knots[high] - knots[high - 1]
        return rise if self.interpolation == "log" else rise / self._ratio(t)

    def drift(self, t: Scalar) -> Scalar:
        """-sigma^2 times the slope of log(sigma / alpha), since alpha^2 + sigma^2 = 1."""
        return _elementwise(lambda s: -self._slope(s) / (1 + self._ratio(s) ** -2), t)

    def diffusion(self, t: Scalar) -> Scalar:
        """2 sigma^2 times that slope."""
        return _elementwise(lambda s: 2 * self._slope(s) / (1 + self._ratio(s) ** -2), t)


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

    def drift(self, t: Scalar) -> Scalar:
        """0."""
        return _elementwise(torch.zeros_like, t)

    def diffusion(self, t: Scalar) -> Scalar:
        """The path's own over alpha^2."""
        return _elementwise(lambda s: self.path.diffusion(s) / self.path.alpha(s) ** 2, t)
