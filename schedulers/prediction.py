"""The meaning of a network's output: estimates of x0 and eps, and the training target.

Every formula holds for any alpha and sigma, so one prediction serves VP, VE and flow coordinates. v, flow and edm
divide by neither alpha nor sigma and are exact at both ends of a path. eps and x0 divide by at least FLOOR there and
stay finite.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from schedulers.grid import Point

FLOOR = 2.0**-24  # below any alpha or sigma of a published path, far above float32's underflow


@dataclass(frozen=True, eq=False)
class Estimate:
    """The network's estimate of the clean data and the noise, with the shape and dtype of the state.

    Both are stored: computing one from the other loses digits at small sigma, and clipping changes x0 alone.

    Attributes:
        x0: The estimate of the clean data.
        eps: The estimate of the noise.
        variance: The raw output for the variance of a checkpoint that learned one; None for any other.
    """

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None


class Prediction(Protocol):
    """The meaning of a network's output."""

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """Estimate x0 and eps.

        Args:
            output: The raw output of the network.
            x: The unscaled state.
            point: The grid point of the state.

        Returns:
            The estimate, in the dtype of x.
        """

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the training target of the network at x = alpha * x0 + sigma * eps.

        Args:
            x0: The clean data.
            eps: Standard normal noise, shaped like x0.
            alpha: The factor of the data, broadcastable to x0.
            sigma: The factor of the noise, broadcastable to x0.

        Returns:
            The target, shaped like x0.
        """


@dataclass(frozen=True)
class Eps:
    """The network predicts the noise: output = eps, x0 = (x - sigma * eps) / alpha.

    Ho et al. 2020 (arXiv 2006.11239), equation 14.
    """

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """Estimate x0 from the predicted eps."""
        eps = output.to(x.dtype)
        return Estimate((x - point.sigma * eps) / max(point.alpha, FLOOR), eps)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return eps."""
        return eps


@dataclass(frozen=True)
class X0:
    """The network predicts the clean data: output = x0, eps = (x - alpha * x0) / sigma.

    Salimans and Ho 2022 (arXiv 2202.00512), section 4.
    """

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """Estimate eps from the predicted x0."""
        x0 = output.to(x.dtype)
        return Estimate(x0, (x - point.alpha * x0) / max(point.sigma, FLOOR))

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return x0."""
        return x0


@dataclass(frozen=True)
class Score:
    """The network predicts the score -eps / sigma: eps = -sigma * output, x0 = (x + sigma^2 * output) / alpha.

    Song et al. 2021 (arXiv 2011.13456), equation 7 and appendix C.
    """

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """Estimate eps and x0 from the predicted score."""
        return Eps().estimate(-point.sigma * output.to(x.dtype), x, point)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return -eps / sigma."""
        return -eps / sigma


@dataclass(frozen=True)
class Flow:
    """The network predicts the velocity u = eps - x0.

        x0 = (x - sigma * u) / (alpha + sigma),    eps = (x + alpha * u) / (alpha + sigma).

    Liu et al. 2022 (arXiv 2209.03003), equation 1, with the sign of SD3 and FLUX. On the flow path alpha + sigma = 1.
    """

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """Estimate x0 and eps from the predicted velocity."""
        u, total = output.to(x.dtype), point.alpha + point.sigma
        return Estimate((x - point.sigma * u) / total, (x + point.alpha * u) / total)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return eps - x0."""
        return eps - x0


@dataclass(frozen=True)
class V:
    """The network predicts v = a * eps - s * x0, with (a, s) = (alpha, sigma) / r and r = sqrt(alpha^2 + sigma^2).

        x0 = a * x / r - s * v,    eps = s * x / r + a * v.

    Salimans and Ho 2022 (arXiv 2202.00512), section 4 and appendix D.
    """

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """Estimate x0 and eps from the predicted v."""
        v, r = output.to(x.dtype), math.hypot(point.alpha, point.sigma)
        a, s = point.alpha / r, point.sigma / r
        return Estimate((a / r) * x - s * v, (s / r) * x + a * v)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return (alpha * eps - sigma * x0) / sqrt(alpha^2 + sigma^2)."""
        return (alpha * eps - sigma * x0) / (alpha**2 + sigma**2).sqrt()


@dataclass(frozen=True)
class EDM:
    """The network predicts F of the preconditioned denoiser x0 = c_skip * x + sign * c_out * F.

    At alpha = 1: c_skip = sigma_d^2 / (sigma^2 + sigma_d^2), c_out = sigma * sigma_d / sqrt(sigma^2 + sigma_d^2). The
    network's input is c_in * x with c_in = 1 / sqrt(sigma^2 + sigma_d^2). Karras et al. 2022 (arXiv 2206.00364),
    equation 7 and table 1.

    With D = sqrt(sigma^2 + sigma_d^2 alpha^2), a = sigma_d * alpha / D and s = sigma / D, this is the rotation used
    here:

        x0 / sigma_d = a * x / D + sign * s * F,    eps = s * x / D - sign * a * F.

    Attributes:
        sigma_data: The standard deviation of the data, sigma_d, above 0.
        sign: The sign of the output, 1 or -1. With -1 it is that of a flow's velocity, and of v, which it equals at
            sigma_d = 1.

    Raises:
        ValueError: sigma_data is not above 0, or sign is neither 1 nor -1.
    """

    sigma_data: float = 0.5
    sign: int = 1

    def __post_init__(self) -> None:
        if self.sigma_data <= 0 or self.sign not in (-1, 1):
            raise ValueError(f"EDM needs sigma_data > 0 and sign 1 or -1, got {self.sigma_data} and {self.sign}")

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """Estimate x0 and eps from the output F by the rotation of the class."""
        f, d = self.sign * output.to(x.dtype), math.hypot(point.sigma, self.sigma_data * point.alpha)
        a, s = self.sigma_data * point.alpha / d, point.sigma / d
        return Estimate(self.sigma_data * ((a / d) * x + s * f), (s / d) * x - a * f)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return sign * (sigma * x0 / sigma_d - sigma_d * alpha * eps) / D."""
        a, s = self.sigma_data * alpha, sigma
        return self.sign * (s * x0 / self.sigma_data - a * eps) / (a**2 + s**2).sqrt()


@dataclass(frozen=True)
class Clipped:
    """Another prediction with x0 clamped to [-limit, limit], for data known to lie in that range.

    Attributes:
        prediction: The prediction to clip.
        limit: The bound of |x0|.
        recompute_eps: Whether eps is computed again from the clamped x0. False keeps the raw eps, as diffusers' DDIM
            does. GLIDE recomputes it, and so does the DDPM posterior, whose mean is a function of x and x0.
    """

    prediction: Prediction
    limit: float = 1.0
    recompute_eps: bool = False

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """Estimate with the inner prediction, then clamp x0."""
        raw = self.prediction.estimate(output, x, point)
        x0 = raw.x0.clamp(-self.limit, self.limit)
        eps = X0().estimate(x0, x, point).eps if self.recompute_eps else raw.eps
        return Estimate(x0, eps, raw.variance)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the target of the inner prediction."""
        return self.prediction.target(x0, eps, alpha, sigma)


@dataclass(frozen=True)
class Thresholded:
    """Another prediction with dynamic thresholding: x0 clamped to [-s, s] and divided by s.

    For each sample, s is the quantile of |x0|, limited to [1, limit]. Saharia et al. 2022 (arXiv 2205.11487), section
    2.3, for checkpoints in pixel space.

    Attributes:
        prediction: The prediction to threshold.
        quantile: The quantile of |x0| that gives s, from 0 to 1.
        limit: The largest s.
        recompute_eps: Whether eps is computed again from the thresholded x0. False keeps the raw eps.
    """

    prediction: Prediction
    quantile: float = 0.995
    limit: float = 1.0
    recompute_eps: bool = False

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """Estimate with the inner prediction, then threshold x0 per sample."""
        raw = self.prediction.estimate(output, x, point)
        flat = raw.x0.reshape(len(x), -1)
        s = flat.abs().quantile(self.quantile, dim=1, keepdim=True).clamp(1.0, max(self.limit, 1.0))
        x0 = (flat.clamp(-s, s) / s).reshape(x.shape)
        eps = X0().estimate(x0, x, point).eps if self.recompute_eps else raw.eps
        return Estimate(x0, eps, raw.variance)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the target of the inner prediction."""
        return self.prediction.target(x0, eps, alpha, sigma)


@dataclass(frozen=True)
class LearnedVariance:
    """Another prediction for a checkpoint with twice the channels: first its output, then the variance.

    Nichol and Dhariwal 2021 (arXiv 2102.09672), section 3.1; DiT. Channels are dimension 1.

    Attributes:
        prediction: The prediction of the first half of the channels.
        use: Whether the variance is passed on. False drops it, as samplers without a learned variance do.
    """

    prediction: Prediction
    use: bool = True

    def estimate(self, output: Tensor, x: Tensor, point: Point) -> Estimate:
        """Estimate from the first half of the channels.

        Args:
            output: The raw output, shape (batch, 2 * channels, ...).
            x: The unscaled state, shape (batch, channels, ...).
            point: The grid point of the state.

        Returns:
            The estimate, with the raw variance if `use` is set.

        Raises:
            ValueError: The output does not have twice the channels of the state.
        """
        if output.shape[1] != 2 * x.shape[1]:
            raise ValueError(
                f"a learned variance needs {2 * x.shape[1]} channels, the network gave {output.shape[1]}; "
                "set learned_variance=null for this checkpoint"
            )
        mean, variance = output.chunk(2, dim=1)
        raw = self.prediction.estimate(mean, x, point)
        return Estimate(raw.x0, raw.eps, variance.to(x.dtype) if self.use else None)

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the target of the inner prediction; the variance is trained by the variational bound instead."""
        return self.prediction.target(x0, eps, alpha, sigma)
