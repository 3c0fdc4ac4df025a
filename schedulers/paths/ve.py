"""Paths with alpha = 1: EDM's, NCSN++'s geometric one, and any other seen in x / alpha."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from schedulers.paths.base import NoisePath, Scalar, elementwise

TauMap = Literal["log_sigma", "flow_time", "sigma", "arctan"]


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
        return elementwise(torch.ones_like, t)

    def sigma(self, t: Scalar) -> Scalar:
        """t."""
        return elementwise(lambda s: s, t)

    def tau(self, t: Scalar) -> Scalar:
        """log(t) / 4, 1000 t / (1 + t), 2 arctan(t) / pi or t, by tau_map."""
        if self.tau_map == "log_sigma":
            return elementwise(lambda s: s.clamp(min=1e-20).log() / 4, t)
        if self.tau_map == "flow_time":
            return elementwise(lambda s: 1000 * s / (1 + s), t)
        if self.tau_map == "arctan":
            return elementwise(lambda s: s.arctan() * (2 / math.pi), t)
        return self.sigma(t)

    def c_in(self, t: Scalar) -> Scalar:
        """1 / sqrt(sigma^2 + sigma_data^2)."""
        return elementwise(lambda s: (s**2 + self.sigma_data**2).rsqrt(), t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """ratio, since sigma / alpha = t."""
        return self.sigma(ratio)

    def init_std(self, t: float) -> float:
        """sigma(t), as in Algorithm 2 of the paper."""
        return self.sigma(t)

    def drift(self, t: Scalar) -> Scalar:
        """0."""
        return elementwise(torch.zeros_like, t)

    def diffusion(self, t: Scalar) -> Scalar:
        """2 t."""
        return elementwise(lambda s: 2 * s, t)


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
        return elementwise(torch.ones_like, t)

    def sigma(self, t: Scalar) -> Scalar:
        """sigma_min * (sigma_max / sigma_min)^t."""
        return elementwise(lambda s: self.sigma_min * (self._rate * s).exp(), t)

    def tau(self, t: Scalar) -> Scalar:
        """sigma(t)."""
        return self.sigma(t)

    def c_in(self, t: Scalar) -> Scalar:
        """1."""
        return elementwise(torch.ones_like, t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """log(ratio / sigma_min) / log(sigma_max / sigma_min), at least 0."""
        return elementwise(lambda r: (r / self.sigma_min).log().clamp(0, None) / self._rate, ratio)

    def init_std(self, t: float) -> float:
        """sigma(t)."""
        return self.sigma(t)

    def drift(self, t: Scalar) -> Scalar:
        """0."""
        return elementwise(torch.zeros_like, t)

    def diffusion(self, t: Scalar) -> Scalar:
        """2 log(sigma_max / sigma_min) sigma^2."""
        return elementwise(lambda s: 2 * self._rate * (self.sigma_min * (self._rate * s).exp()) ** 2, t)


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
        return elementwise(torch.ones_like, t)

    def sigma(self, t: Scalar) -> Scalar:
        """The path's sigma / alpha."""
        return elementwise(lambda s: self.path.sigma(s) / self.path.alpha(s), t)

    def tau(self, t: Scalar) -> Scalar:
        """The path's own."""
        return self.path.tau(t)

    def c_in(self, t: Scalar) -> Scalar:
        """The path's c_in * alpha, which brings the state back to what the network was trained on."""
        return elementwise(lambda s: self.path.c_in(s) * self.path.alpha(s), t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """The path's own; the ratio does not depend on coordinates."""
        return self.path.t_of(ratio)

    def init_std(self, t: float) -> float:
        """The path's init_std / alpha."""
        return self.path.init_std(t) / self.path.alpha(t)

    def drift(self, t: Scalar) -> Scalar:
        """0."""
        return elementwise(torch.zeros_like, t)

    def diffusion(self, t: Scalar) -> Scalar:
        """The path's own over alpha^2."""
        return elementwise(lambda s: self.path.diffusion(s) / self.path.alpha(s) ** 2, t)
