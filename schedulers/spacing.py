"""Where along a path the steps are taken: path + number of steps -> Grid."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from schedulers.grid import Grid
from schedulers.paths import NoisePath

End = Literal["clean", "t_min"]


class Spacing(Protocol):
    """The choice of points for a number of steps."""

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """steps + 1 rows, noise first. Raises ValueError when the path cannot be cut into that many steps."""


def grid_at(path: NoisePath, t: Tensor, end: End = "clean") -> Grid:
    """The grid with one row at each time of t (shape (steps,), float64, falling), and a last row.

    end="clean" appends alpha = 1, sigma = 0; end="t_min" appends the path's own t_min, where some noise is left.
    """
    t = t.to(torch.float64)
    last = torch.tensor([path.t_of(0.0) if end == "clean" else path.t_min], dtype=torch.float64)
    t = torch.cat([t, last])
    alpha, sigma = path.alpha(t), path.sigma(t)
    if end == "clean":
        alpha[-1], sigma[-1] = 1.0, 0.0
    return Grid(t, alpha, sigma, path.tau(t), path.c_in(t), path.init_std(float(t[0])))


def _count(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"steps={steps}; ask for at least 1")
    return steps


def _trained(path: NoisePath, steps: int) -> int:
    """The number of trained indices, once it is known that `steps` of them can be picked."""
    total = round(path.t_max - path.t_min) + 1
    if _count(steps) > total:
        raise ValueError(f"steps={steps} on a path of {total} trained timesteps; ask for {total} or fewer")
    return total


@dataclass(frozen=True)
class FlowLinspace:
    """sigma even from 1 to sigma_last, shifted once by s * sigma / (1 + (s - 1) * sigma), then 0. For the flow path.

    Esser et al. 2024 (arXiv 2403.03206), equation 23. sigma_last is the unshifted sigma of the last network
    evaluation: None means 1 / steps, all steps even, as FLUX does; 0.001 is the convention of diffusers' SD3. A
    static shift applied twice, as in diffusers' FlowMatchEulerDiscrete (issue 13243), is sigma_last = shift * 0.001 /
    (1 + (shift - 1) * 0.001).
    """

    shift: float = 1.0
    sigma_last: float | None = None

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift}; give a number above 0 (1 leaves the grid even)")
        if self.sigma_last is not None and not 0 < self.sigma_last < 1:
            raise ValueError(f"sigma_last={self.sigma_last}; give a sigma inside (0, 1), or None for even steps")

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        last = 1 / _count(steps) if self.sigma_last is None else self.sigma_last
        sigma = torch.linspace(1.0, last, steps, dtype=torch.float64)
        sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        return grid_at(path, path.t_of(sigma / (1 - sigma)))


@dataclass(frozen=True)
class Leading:
    """t = i * (N // n) + steps_offset, i = n - 1 ... 0. For discrete paths; DDPM, DDIM and Stable Diffusion.

    Lin et al. 2023 (arXiv 2305.08891), table 2. The last row is `end`: "clean" is diffusers' set_alpha_to_one,
    "t_min" its alpha-bar of index 0.
    """

    steps_offset: int = 0
    end: End = "clean"

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        total = _trained(path, steps)
        t = torch.arange(steps - 1, -1, -1) * (total // steps) + self.steps_offset
        if not 0 <= int(t[-1]) <= int(t[0]) <= total - 1:
            raise ValueError(
                f"steps={steps} with steps_offset={self.steps_offset} asks for timesteps {int(t[0])} to {int(t[-1])}, "
                f"outside 0 to {total - 1}; lower steps, or set steps_offset=0"
            )
        return grid_at(path, t, self.end)


@dataclass(frozen=True)
class Trailing:
    """t = round(N - i * N / n) - 1, i = 0 ... n - 1, so the first step is at the noisiest index. For discrete paths.

    Lin et al. 2023 (arXiv 2305.08891), table 2.
    """

    end: End = "clean"

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        total = _trained(path, steps)
        stride = total - (total - total / steps)  # the rounding of numpy's arange, so that ties fall as diffusers' do
        t = torch.round(total - torch.arange(steps, dtype=torch.float64) * stride) - 1
        return grid_at(path, t, self.end)


@dataclass(frozen=True)
class Linspace:
    """t even from t_max to t_min, both included, then `end`. For discrete paths.

    Lin et al. 2023 (arXiv 2305.08891), table 2. integer=True rounds to trained indices (DDIM); False keeps fractions
    (Euler). A single step is taken at t_max.
    """

    integer: bool = False
    end: End = "clean"

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        _trained(path, steps)
        stride = (path.t_max - path.t_min) / max(steps - 1, 1)  # multiplied out as numpy does, so that ties round alike
        t = path.t_min + torch.arange(steps - 1, -1, -1, dtype=torch.float64) * stride
        t[0] = path.t_max
        return grid_at(path, t.round() if self.integer else t, self.end)


@dataclass(frozen=True)
class Karras:
    """sigma / alpha = (max^(1/rho) + i / (n - 1) * (min^(1/rho) - max^(1/rho)))^rho, then `end`.

    Karras et al. 2022 (arXiv 2206.00364), equation 5. max and min are the path's own at t_max and t_min unless given.
    Raises ValueError on a path that reaches alpha = 0.
    """

    rho: float = 7.0
    sigma_min: float | None = None
    sigma_max: float | None = None
    end: End = "clean"

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        if path.alpha(path.t_max) <= 0:
            raise ValueError(
                "karras spacing needs a finite sigma / alpha, and this path reaches alpha = 0; use linspace"
            )
        high = self.sigma_max if self.sigma_max is not None else path.sigma(path.t_max) / path.alpha(path.t_max)
        low = self.sigma_min if self.sigma_min is not None else path.sigma(path.t_min) / path.alpha(path.t_min)
        if not 0 < low < high or self.rho <= 0:
            raise ValueError(
                f"karras spacing needs 0 < sigma_min < sigma_max and rho > 0, got {low}, {high} and {self.rho}"
            )
        ramp = torch.linspace(0, 1, _count(steps), dtype=torch.float64)
        ratio = (high ** (1 / self.rho) + ramp * (low ** (1 / self.rho) - high ** (1 / self.rho))) ** self.rho
        return grid_at(path, path.t_of(ratio), self.end)
