"""The path of rectified flow."""

from dataclasses import dataclass

import torch

from schedulers.paths.base import Scalar, elementwise


@dataclass(frozen=True)
class FlowPath:
    """Rectified flow: alpha = 1 - t, sigma = t, tau = time_scale * t, with t in [0, 1].

    Liu et al. 2022 (arXiv 2209.03003), equation 1, and Lipman et al. 2022 (arXiv 2210.02747). Noise is at t = 1, as in
    SD3 and FLUX.

    Attributes:
        time_scale: The timestep at t = 1.
        t_min: The time nearest to the data.
        t_max: The time of pure noise.
    """

    time_scale: float = 1000.0
    t_min: float = 0.0
    t_max: float = 1.0

    def alpha(self, t: Scalar) -> Scalar:
        """Return 1 - t."""
        return elementwise(lambda s: 1 - s, t)

    def sigma(self, t: Scalar) -> Scalar:
        """Return t."""
        return elementwise(lambda s: s, t)

    def tau(self, t: Scalar) -> Scalar:
        """Return time_scale * t."""
        return elementwise(lambda s: self.time_scale * s, t)

    def c_in(self, t: Scalar) -> Scalar:
        """Return 1."""
        return elementwise(torch.ones_like, t)

    def t_of(self, ratio: Scalar) -> Scalar:
        """Return ratio / (1 + ratio); an infinite ratio gives 1."""
        return elementwise(lambda r: 1 / (1 + 1 / r), ratio)

    def init_std(self, t: float) -> float:
        """Return sigma(t), which is 1 at t = 1."""
        return self.sigma(t)

    def drift(self, t: Scalar) -> Scalar:
        """Return -1 / (1 - t)."""
        return elementwise(lambda s: -1 / (1 - s), t)

    def diffusion(self, t: Scalar) -> Scalar:
        """Return 2 t / (1 - t)."""
        return elementwise(lambda s: 2 * s / (1 - s), t)
