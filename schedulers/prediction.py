"""What a network's output means: from output and state to an estimate of x0 and eps, and back to a training target.

Every formula is written for any alpha and sigma, so one prediction serves VP, VE and flow coordinates alike. v, flow
and edm divide by neither alpha nor sigma and are exact at both ends of a path; eps and x0 are floored there and stay
finite.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from schedulers.grid import Point

FLOOR = 2.0**-24  # below any alpha or sigma that a published path reaches, far above float32's underflow


@dataclass(frozen=True, eq=False)
class Estimate:
    """The network's belief about the clean data and the noise, both shaped and typed like the state.

    Both are kept: recomputing one from the other loses digits at small sigma, and clipping changes x0 alone. variance
    is what a checkpoint with a learned variance says of it, raw, and None for any other.
    """

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None


class Prediction(Protocol):
    """The meaning of a network's output."""

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """Estimate x0 and eps from the raw output and the (unscaled) state x, in x's dtype."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network is trained to output at x = alpha * x0 + sigma * eps; alpha and sigma broadcast to x0."""


@dataclass(frozen=True)
class Eps:
    """output = eps. x0 = (x - sigma * eps) / alpha. Ho et al. 2020 (arXiv 2006.11239), equation 14."""

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """See the class."""
        eps = output.to(x.dtype)
        return Estimate((x - point.sigma * eps) / max(point.alpha, FLOOR), eps)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """eps."""
        return eps


@dataclass(frozen=True)
class X0:
    """output = x0. eps = (x - alpha * x0) / sigma. Salimans and Ho 2022 (arXiv 2202.00512), section 4."""

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """See the class."""
        x0 = output.to(x.dtype)
        return Estimate(x0, (x - point.alpha * x0) / max(point.sigma, FLOOR))

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x0."""
        return x0


@dataclass(frozen=True)
class Score:
    """output = the score, -eps / sigma. eps = -sigma * output, x0 = (x + sigma^2 * output) / alpha.

    Song et al. 2021 (arXiv 2011.13456), equation 7 and appendix C.
    """

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """See the class."""
        return Eps().estimate(-point.sigma * output.to(x.dtype), x, point)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """-eps / sigma."""
        return -eps / sigma


@dataclass(frozen=True)
class Flow:
    """output u = eps - x0. x0 = (x - sigma * u) / (alpha + sigma), eps = (x + alpha * u) / (alpha + sigma).

    Liu et al. 2022 (arXiv 2209.03003), equation 1, in the sign of SD3 and FLUX; alpha + sigma = 1 on the flow path
    itself.
    """

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """See the class."""
        u, total = output.to(x.dtype), point.alpha + point.sigma
        return Estimate((x - point.sigma * u) / total, (x + point.alpha * u) / total)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """eps - x0."""
        return eps - x0


@dataclass(frozen=True)
class V:
    """output v = a * eps - s * x0, with (a, s) = (alpha, sigma) / r and r = sqrt(alpha^2 + sigma^2).

    x0 = a * x / r - s * v, eps = s * x / r + a * v. Salimans and Ho 2022 (arXiv 2202.00512), section 4 and appendix D.
    """

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """See the class."""
        v, r = output.to(x.dtype), math.hypot(point.alpha, point.sigma)
        a, s = point.alpha / r, point.sigma / r
        return Estimate((a / r) * x - s * v, (s / r) * x + a * v)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(alpha * eps - sigma * x0) / sqrt(alpha^2 + sigma^2)."""
        return (alpha * eps - sigma * x0) / (alpha**2 + sigma**2).sqrt()


@dataclass(frozen=True)
class EDM:
    """output F of the preconditioned denoiser x0 = c_skip * x + sign * c_out * F.

    At alpha = 1: c_skip = sigma_d^2 / (sigma^2 + sigma_d^2), c_out = sigma * sigma_d / sqrt(sigma^2 + sigma_d^2), the
    network's input is c_in * x with c_in = 1 / sqrt(sigma^2 + sigma_d^2). Karras et al. 2022 (arXiv 2206.00364),
    equation 7 and table 1. With D = sqrt(sigma^2 + sigma_d^2 alpha^2), a = sigma_d * alpha / D and s = sigma / D this
    is the rotation

        x0 / sigma_d = a * x / D + sign * s * F,    eps = s * x / D - sign * a * F,

    which is used here. sign = -1 gives the output the sign of a flow's velocity (and of v, which it equals at sigma_d
    = 1).
    """

    sigma_data: float = 0.5
    sign: int = 1

    def __post_init__(self) -> None:
        if self.sigma_data <= 0 or self.sign not in (-1, 1):
            raise ValueError(f"EDM needs sigma_data > 0 and sign 1 or -1, got {self.sigma_data} and {self.sign}")

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """See the class."""
        f, d = self.sign * output.to(x.dtype), math.hypot(point.sigma, self.sigma_data * point.alpha)
        a, s = self.sigma_data * point.alpha / d, point.sigma / d
        return Estimate(self.sigma_data * ((a / d) * x + s * f), (s / d) * x - a * f)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """sign * (sigma * x0 / sigma_d - sigma_d * alpha * eps) / D."""
        a, s = self.sigma_data * alpha, sigma
        return self.sign * (s * x0 / self.sigma_data - a * eps) / (a**2 + s**2).sqrt()


@dataclass(frozen=True)
class Clipped:
    """Another prediction with x0 clamped to [-limit, limit], for data known to lie there.

    eps stays the raw one, as in diffusers' DDIM; recompute_eps derives it again from the clamped x0, as in GLIDE
    and in the DDPM posterior, whose mean is a function of x and x0.
    """

    prediction: Prediction
    limit: float = 1.0
    recompute_eps: bool = False

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """See the class."""
        raw = self.prediction.estimate(output, x, point)
        x0 = raw.x0.clamp(-self.limit, self.limit)
        eps = X0().estimate(x0, x, point).eps if self.recompute_eps else raw.eps
        return Estimate(x0, eps, raw.variance)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The target of the prediction inside."""
        return self.prediction.target(x0, eps, alpha, sigma)


@dataclass(frozen=True)
class Thresholded:
    """Another prediction with x0 clamped to [-s, s] and divided by s, s the share-quantile of |x0| of each sample.

    s is kept inside [1, limit]. Dynamic thresholding, Saharia et al. 2022 (arXiv 2205.11487), section 2.3, for
    checkpoints in pixel space. eps stays the raw one; recompute_eps derives it again from the thresholded x0.
    """

    prediction: Prediction
    quantile: float = 0.995
    limit: float = 1.0
    recompute_eps: bool = False

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """See the class."""
        raw = self.prediction.estimate(output, x, point)
        flat = raw.x0.reshape(len(x), -1)
        s = flat.abs().quantile(self.quantile, dim=1, keepdim=True).clamp(1.0, max(self.limit, 1.0))
        x0 = (flat.clamp(-s, s) / s).reshape(x.shape)
        eps = X0().estimate(x0, x, point).eps if self.recompute_eps else raw.eps
        return Estimate(x0, eps, raw.variance)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The target of the prediction inside."""
        return self.prediction.target(x0, eps, alpha, sigma)


@dataclass(frozen=True)
class LearnedVariance:
    """Another prediction of a checkpoint with twice the channels: first its output, then the variance.

    use=False drops the second half, as the samplers without a variance of their own do. Nichol and Dhariwal 2021
    (arXiv 2102.09672), section 3.1; DiT. Channels are dimension 1. Raises ValueError for another number of channels.
    """

    prediction: Prediction
    use: bool = True

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """See the class."""
        if output.shape[1] != 2 * x.shape[1]:
            raise ValueError(
                f"a learned variance needs {2 * x.shape[1]} channels, the network gave {output.shape[1]}; "
                "set learned_variance=null for this checkpoint"
            )
        mean, variance = output.chunk(2, dim=1)
        raw = self.prediction.estimate(mean, x, point)
        return Estimate(raw.x0, raw.eps, variance.to(x.dtype) if self.use else None)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The target of the prediction inside; the variance is trained by the bound, not by this."""
        return self.prediction.target(x0, eps, alpha, sigma)
