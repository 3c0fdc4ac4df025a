"""Paths with alpha = 1: EDM's, the geometric one of NCSN++, and any other path seen in x / alpha."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from schedulers.paths.base import NoisePath, Scalar, elementwise

TauMap = Literal["log_sigma", "flow_time", "sigma", "arctan"]


@dataclass(frozen=True)
class EDMPath:
    """Variance exploding in EDM's time: alpha = 1, sigma = t, c_in = 1 / sqrt(sigma^2 + sigma_data^2).

    Karras et al. 2022 (arXiv 2206.00364), table 1. tau at sigma = 0 is finite; no network is called there.

    Attributes:
        sigma_data: The standard deviation of the data, above 0.
        tau_map: The timestep as the checkpoint was trained with it. "log_sigma" is log(sigma) / 4 (EDM); "sigma" is
            sigma itself (NCSN++). "flow_time" is 1000 sigma / (1 + sigma), the timestep of a rectified flow at the same
            sigma / alpha; "arctan" is 2 arctan(sigma) / pi (Stable Audio).
        t_min: The lowest trained sigma, above 0.
        t_max: The highest trained sigma.

    Raises:
        ValueError: A parameter is out of range.
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
        """Return 1."""
        return elementwise(torch.ones_like, t)

    def sigma(self, t: Scalar) -> Scalar:
        """Return t."""
        return elementwise(lambda s: s, t)

    def tau(self, t: Scalar) -> Scalar:
        """Return log(t) / 4, 1000 t / (1 + t), 2 arctan(t) / pi or t, as tau_map says."""
        if self.tau_map == "log_sigma":
            return elementwise(lambda s: s.clamp(min=1e-20).log() / 4, t)
        if self.tau_map == "flow_time":
            return elementwise(lambda s: 1000 * s / (1 + s), t)
        if self.tau_map == "arctan":
            return elementwise(lambda s: s.arctan() * (2 / math.pi), t)
        return self.sigma(t)

    def c_in(self, t: Scalar) -> Scalar:
        """Return 1 / sqrt(sigma^2 + sigma_data^2)."""
        return elementwise(lambda s: (s**2 + self.sigma_data**2).rsqrt(), t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """Return ratio, since sigma / alpha = t."""
        return self.sigma(ratio)

    def init_std(self, t: float) -> float:
        """Return sigma(t), as in Algorithm 2 of the paper."""
        return self.sigma(t)

    def drift(self, t: Scalar) -> Scalar:
        """Return 0."""
        return elementwise(torch.zeros_like, t)

    def diffusion(self, t: Scalar) -> Scalar:
        """Return 2 t."""
        return elementwise(lambda s: 2 * s, t)


@dataclass(frozen=True)
class GeometricVEPath:
    """Variance exploding: alpha = 1, sigma = sigma_min * (sigma_max / sigma_min)^t, t in [1e-5, 1], tau = sigma.

    Song et al. 2021 (arXiv 2011.13456), appendix C and D. NCSN++ with continuous training is conditioned on sigma.
    Except for the clean end of a grid, no point has a sigma below sigma_min.

    Attributes:
        sigma_min: The sigma at t = 0, above 0.
        sigma_max: The sigma at t = 1.
        t_min: The time nearest to the data.
        t_max: The time of the noisiest state.

    Raises:
        ValueError: Not 0 < sigma_min < sigma_max.
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
        """Return 1."""
        return elementwise(torch.ones_like, t)

    def sigma(self, t: Scalar) -> Scalar:
        """Return sigma_min * (sigma_max / sigma_min)^t."""
        return elementwise(lambda s: self.sigma_min * (self._rate * s).exp(), t)

    def tau(self, t: Scalar) -> Scalar:
        """Return sigma(t)."""
        return self.sigma(t)

    def c_in(self, t: Scalar) -> Scalar:
        """Return 1."""
        return elementwise(torch.ones_like, t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """Return log(ratio / sigma_min) / log(sigma_max / sigma_min), at least 0."""
        return elementwise(lambda r: (r / self.sigma_min).log().clamp(0, None) / self._rate, ratio)

    def init_std(self, t: float) -> float:
        """Return sigma(t)."""
        return self.sigma(t)

    def drift(self, t: Scalar) -> Scalar:
        """Return 0."""
        return elementwise(torch.zeros_like, t)

    def diffusion(self, t: Scalar) -> Scalar:
        """Return 2 log(sigma_max / sigma_min) sigma^2."""
        return elementwise(lambda s: 2 * self._rate * (self.sigma_min * (self._rate * s).exp()) ** 2, t)


@dataclass(frozen=True, eq=False)
class VECoordinates:
    """Another path seen in x / alpha: alpha = 1, sigma = the path's sigma / alpha, c_in = the path's c_in * alpha.

    The samplers of k-diffusion step in these coordinates, and so do diffusers' Euler and Heun for discrete checkpoints.
    Most solvers give the same sample in both coordinates; Heun does not.

    Attributes:
        path: The path in its own coordinates.

    Raises:
        ValueError: The path reaches alpha = 0.
    """

    path: NoisePath

    def __post_init__(self) -> None:
        if self.path.alpha(self.t_max) <= 0:
            raise ValueError("this path reaches alpha = 0, where sigma / alpha is infinite; use its own coordinates")

    @property
    def t_min(self) -> float:
        """The inner path's t_min."""
        return self.path.t_min

    @property
    def t_max(self) -> float:
        """The inner path's t_max."""
        return self.path.t_max

    def alpha(self, t: Scalar) -> Scalar:
        """Return 1."""
        return elementwise(torch.ones_like, t)

    def sigma(self, t: Scalar) -> Scalar:
        """Return the inner path's sigma / alpha."""
        return elementwise(lambda s: self.path.sigma(s) / self.path.alpha(s), t)

    def tau(self, t: Scalar) -> Scalar:
        """Return the inner path's tau."""
        return self.path.tau(t)

    def c_in(self, t: Scalar) -> Scalar:
        """Return the inner path's c_in * alpha, which restores the scale that the network was trained on."""
        return elementwise(lambda s: self.path.c_in(s) * self.path.alpha(s), t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """Return the inner path's time; the ratio does not depend on coordinates."""
        return self.path.t_of(ratio)

    def init_std(self, t: float) -> float:
        """Return the inner path's init_std / alpha."""
        return self.path.init_std(t) / self.path.alpha(t)

    def drift(self, t: Scalar) -> Scalar:
        """Return 0."""
        return elementwise(torch.zeros_like, t)

    def diffusion(self, t: Scalar) -> Scalar:
        """Return the inner path's diffusion over alpha^2."""
        return elementwise(lambda s: self.path.diffusion(s) / self.path.alpha(s) ** 2, t)
