"""Variance-preserving paths: on trained indices, and in continuous time."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from schedulers.paths.base import Scalar, elementwise

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos"]


def betas(schedule: BetaSchedule, start: float = 1e-4, end: float = 0.02, steps: int = 1000) -> Tensor:
    """Return the training noise increments of a discrete path.

    Args:
        schedule: The schedule. "linear" is Ho et al. 2020 (arXiv 2006.11239), section 4. "scaled_linear" is linear in
            the square root (Stable Diffusion). "squaredcos" is Nichol and Dhariwal 2021 (arXiv 2102.09672), equation
            17, with betas capped at 0.999; it does not use start and end.
        start: The first beta.
        end: The last beta.
        steps: The number of trained timesteps N.

    Returns:
        The betas, float64 of shape (steps,).

    Raises:
        ValueError: The schedule has another name.
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


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Return betas rescaled to end at pure noise: sqrt(alpha-bar) is shifted and scaled, its first value unchanged.

    Lin et al. 2023 (arXiv 2305.08891), Algorithm 1.

    Args:
        betas: The noise increments, shape (N,).

    Returns:
        The rescaled increments, float64 of shape (N,). The last one is 1.
    """
    root = (1 - betas.double()).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    alpha_bar[-1] = 0.0
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


@dataclass(frozen=True, eq=False)
class DiscreteVPPath:
    """Variance preserving on N trained indices: alpha^2 = prod(1 - beta), sigma^2 = 1 - alpha^2, tau = t in [0, N - 1].

    Ho et al. 2020 (arXiv 2006.11239), equation 4. sigma / alpha is interpolated between indices.

    Attributes:
        betas: The noise increments, shape (N,), each inside (0, 1). The last may be 1, which ends the path at pure
            noise (zero_terminal_snr).
        interpolation: The scale of the interpolation. "log" is the logarithm of sigma / alpha, as in k-diffusion and
            DPM-Solver. "linear" is sigma / alpha itself, as in diffusers' EulerDiscrete for `linspace`.
        last_alpha_bar: An alpha-bar above 0 in place of the last one, for samplers that divide by alpha: diffusers' use
            2^-24 at zero terminal SNR. Indices before the last may then be noisier than it.

    Raises:
        ValueError: Fewer than two betas, or a number out of range.
    """

    betas: Tensor
    interpolation: Literal["log", "linear"] = "log"
    last_alpha_bar: float | None = None

    def __post_init__(self) -> None:
        betas = self.betas.detach().to("cpu", torch.float64).clone()
        inside = (betas > 0) & (betas < 1)
        if betas.ndim != 1 or len(betas) < 2 or not inside[:-1].all() or not 0 < betas[-1] <= 1:
            raise ValueError("DiscreteVPPath needs at least two betas, each inside (0, 1); the last may be 1")
        if self.last_alpha_bar is not None and not 0 < self.last_alpha_bar < 1:
            raise ValueError(f"last_alpha_bar={self.last_alpha_bar}; give a number inside (0, 1)")
        object.__setattr__(self, "betas", betas)

    @property
    def t_min(self) -> float:
        """The first trained index, 0."""
        return 0.0

    @property
    def t_max(self) -> float:
        """The last trained index, N - 1."""
        return float(len(self.betas) - 1)

    def _knots(self, device: torch.device) -> Tensor:
        """Return log(sigma / alpha) or sigma / alpha at the trained indices. expm1 keeps the first rows' digits."""
        ratio = torch.expm1(-torch.log1p(-self.betas).cumsum(0)).sqrt()
        if self.last_alpha_bar is not None:
            ratio[-1] = math.sqrt(1 / self.last_alpha_bar - 1)
        return (ratio.log() if self.interpolation == "log" else ratio).to(device)

    def _ratio(self, t: Tensor) -> Tensor:
        knots = self._knots(t.device)
        t = t.clamp(0, len(knots) - 1)
        low = t.floor().clamp(max=len(knots) - 2).long()
        fraction = t - low
        value = torch.lerp(knots[low], knots[low + 1], fraction)
        value = torch.where(fraction == 1, knots[low + 1], torch.where(fraction == 0, knots[low], value))
        return value.exp() if self.interpolation == "log" else value

    def alpha(self, t: Scalar) -> Scalar:
        """Return sqrt(alpha_bar) = 1 / sqrt(1 + ratio^2)."""
        return elementwise(lambda s: (1 + self._ratio(s) ** 2).rsqrt(), t)

    def sigma(self, t: Scalar) -> Scalar:
        """Return sqrt(1 - alpha_bar) = ratio / sqrt(1 + ratio^2)."""
        return elementwise(lambda s: (1 + self._ratio(s) ** -2).rsqrt(), t)

    def tau(self, t: Scalar) -> Scalar:
        """Return the index t itself."""
        return elementwise(lambda s: s, t)

    def c_in(self, t: Scalar) -> Scalar:
        """Return 1."""
        return elementwise(torch.ones_like, t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """Return the inverse of the interpolation."""

        def inverse(r: Tensor) -> Tensor:
            knots = self._knots(r.device)
            last, rising = knots[-1], knots[:-1] if knots[-1] < knots[-2] else knots
            wanted = r.log() if self.interpolation == "log" else r
            value = wanted.clamp(rising[0], rising[-1])
            high = torch.searchsorted(rising, value).clamp(1, len(rising) - 1)
            low = high - 1
            fraction = (value - rising[low]) / (rising[high] - rising[low])
            t = torch.where(value == rising[high], high.double(), low + fraction)
            return torch.where(torch.isclose(wanted, last, rtol=1e-12, atol=0), self.t_max, t)

        return elementwise(inverse, ratio)

    def init_std(self, t: float) -> float:
        """Return 1, the standard deviation of the whole state for data of unit variance."""
        return 1.0

    def _slope(self, t: Tensor) -> Tensor:
        """Return d log(sigma / alpha) / dt on the interval that ends at t, where a step towards the data begins."""
        knots = self._knots(t.device)
        high = t.clamp(0, len(knots) - 1).ceil().clamp(min=1).long()
        rise = knots[high] - knots[high - 1]
        return rise if self.interpolation == "log" else rise / self._ratio(t)

    def drift(self, t: Scalar) -> Scalar:
        """Return -sigma^2 times the slope of log(sigma / alpha), since alpha^2 + sigma^2 = 1."""
        return elementwise(lambda s: -self._slope(s) / (1 + self._ratio(s) ** -2), t)

    def diffusion(self, t: Scalar) -> Scalar:
        """Return 2 sigma^2 times the slope of log(sigma / alpha)."""
        return elementwise(lambda s: 2 * self._slope(s) / (1 + self._ratio(s) ** -2), t)


@dataclass(frozen=True)
class ContinuousVPPath:
    """Variance preserving in continuous time, with beta(t) = beta_min + t (beta_max - beta_min) and its integral B(t).

        VP      alpha = exp(-B / 2),    sigma = sqrt(1 - exp(-B))
        sub-VP  alpha = exp(-B / 2),    sigma = 1 - exp(-B),         tau = 999 t, t in [t_min, 1].

    Song et al. 2021 (arXiv 2011.13456), equations 29 and 30 (appendix B) and appendix C.

    Attributes:
        beta_min: The beta at t = 0, above 0.
        beta_max: The beta at t = 1.
        sub: Whether the path is sub-VP instead of VP.
        time_scale: The timestep at t = 1.
        t_min: The time nearest to the data, above 0.
        t_max: The time of the noisiest state.

    Raises:
        ValueError: A parameter is out of range.
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
        """Return exp(-B / 2)."""
        return elementwise(lambda s: (-self._integral(s) / 2).exp(), t)

    def sigma(self, t: Scalar) -> Scalar:
        """Return sqrt(1 - exp(-B)) for VP, 1 - exp(-B) for sub-VP."""
        return elementwise(self._sigma, t)

    def tau(self, t: Scalar) -> Scalar:
        """Return time_scale * t."""
        return elementwise(lambda s: self.time_scale * s, t)

    def c_in(self, t: Scalar) -> Scalar:
        """Return 1."""
        return elementwise(torch.ones_like, t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """Return the time of a ratio: B from the ratio, then t from the quadratic B(t), between 0 and t_max."""

        def inverse(r: Tensor) -> Tensor:
            # VP: r^2 = e^B - 1. sub-VP: r = 2 sinh(B / 2).
            integral = 2 * torch.asinh(r / 2) if self.sub else torch.log1p(r**2)
            slope, curve = self.beta_min, (self.beta_max - self.beta_min) / 2
            t = 2 * integral / (slope + (slope**2 + 4 * curve * integral).sqrt())
            return torch.where(r.isinf(), torch.full_like(t, self.t_max), t).clamp(0, self.t_max)

        return elementwise(inverse, ratio)

    def init_std(self, t: float) -> float:
        """Return 1, the standard deviation of the prior."""
        return 1.0

    def drift(self, t: Scalar) -> Scalar:
        """Return -beta / 2."""
        return elementwise(lambda s: -self._beta(s) / 2, t)

    def diffusion(self, t: Scalar) -> Scalar:
        """Return beta, and for sub-VP beta * (1 - exp(-2 B))."""

        def squared(s: Tensor) -> Tensor:
            return self._beta(s) * (-torch.expm1(-2 * self._integral(s)) if self.sub else 1.0)

        return elementwise(squared, t)
