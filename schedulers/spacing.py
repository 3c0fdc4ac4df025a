"""Where along a path the steps are taken: path + number of steps -> Grid."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from schedulers.grid import Grid
from schedulers.paths import FlowPath, NoisePath

End = Literal["clean", "t_min", "repeat"]


class Spacing(Protocol):
    """The choice of points for a number of steps."""

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """steps + 1 rows, noise first. Raises ValueError when the path cannot be cut into that many steps."""


def grid_at(path: NoisePath, t: Tensor, end: End = "clean") -> Grid:
    """The grid with one row at each time of t (shape (steps,), float64, falling), and a last row.

    end="clean" appends alpha = 1, sigma = 0; end="t_min" appends the path's own t_min, where some noise is left; and
    end="repeat" the last row again, so that the last step changes nothing (diffusers' DEIS).
    """
    t = t.to(torch.float64)
    ends = {"clean": path.t_of(0.0), "t_min": path.t_min, "repeat": float(t[-1])}
    last = torch.tensor([ends[end]], dtype=torch.float64)
    t = torch.cat([t, last])
    alpha, sigma = path.alpha(t), path.sigma(t)
    if end == "clean":
        alpha[-1], sigma[-1] = 1.0, 0.0
    return Grid(t, alpha, sigma, path.tau(t), path.c_in(t), path.init_std(float(t[0])), path)


def _check_steps(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"steps={steps}; ask for at least 1")
    return steps


def _count_trained_timesteps(path: NoisePath, steps: int) -> int:
    """The number of trained indices, once it is known that `steps` of them can be picked."""
    total = round(path.t_max - path.t_min) + 1
    if _check_steps(steps) > total:
        raise ValueError(f"steps={steps} on a path of {total} trained timesteps; ask for {total} or fewer")
    return total


@dataclass(frozen=True)
class FlowLinspace:
    """sigma even from sigma_first to sigma_last, shifted once by s * sigma / (1 + (s - 1) * sigma), then 0.

    Esser et al. 2024 (arXiv 2403.03206), equation 23, for the flow path. sigma_last is the unshifted sigma of the last
    network evaluation: None means sigma_first / steps, all steps even, as FLUX does; 0.001 is the convention of
    diffusers' SD3. A static shift applied twice, as in diffusers' FlowMatchEulerDiscrete (issue 13243), is
    sigma_last = shift * 0.001 / (1 + (shift - 1) * 0.001). spare_row cuts one row more and drops the last one, which is
    then sigma_last (diffusers' DPM-Solver and UniPC). sigma_cap bounds the shifted sigma, for solvers that divide by
    alpha. terminal stretches the shifted rows so that the last is `terminal` (LTX-Video). given, noise first, takes the
    place of the even unshifted sigmas. end is the last row.
    """

    shift: float = 1.0
    sigma_last: float | None = None
    sigma_first: float = 1.0
    spare_row: bool = False
    sigma_cap: float = 1.0
    terminal: float | None = None
    unshifted_sigmas: tuple[float, ...] | None = None
    end: End = "clean"

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift={self.shift}; give a number above 0 (1 leaves the grid even)")
        if self.sigma_last is not None and not 0 <= self.sigma_last < 1:
            raise ValueError(f"sigma_last={self.sigma_last}; give a sigma inside (0, 1), or None for even steps")
        if not 0 < self.sigma_first <= 1 or not 0 < self.sigma_cap <= 1:
            raise ValueError(f"sigma_first={self.sigma_first}, sigma_cap={self.sigma_cap}; give sigmas inside (0, 1]")

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        sigma = self._unshifted(_check_steps(steps))
        if not sigma[-1] > 0:
            raise ValueError("the last network evaluation would be at sigma = 0; give sigma_last above 0, or spare_row")
        sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        if self.terminal is not None:
            sigma = 1 - (1 - sigma) / ((1 - sigma[-1]) / (1 - self.terminal))
        sigma = sigma.clamp(max=self.sigma_cap)
        if isinstance(path, FlowPath):  # its time is sigma, to the last bit: published samplers cut 1000 sigma
            return grid_at(path, sigma, self.end)
        return grid_at(path, path.t_of(sigma / (1 - sigma)), self.end)

    def _unshifted(self, steps: int) -> Tensor:
        if self.unshifted_sigmas is not None:
            if len(self.unshifted_sigmas) != steps:
                raise ValueError(f"steps={steps}, but {len(self.unshifted_sigmas)} sigmas are given; make them agree")
            return torch.tensor(self.unshifted_sigmas, dtype=torch.float64)
        last = self.sigma_first / steps if self.sigma_last is None else self.sigma_last
        rows = steps + 1 if self.spare_row else steps
        if last == 0:  # even in 1 - sigma, from the data: to the last bit what diffusers' DPM-Solver cuts
            return torch.from_numpy(1 - np.linspace(1, 1 - self.sigma_first, rows)).flip(0)[:steps]
        return torch.from_numpy(np.linspace(self.sigma_first, last, rows))[:steps]


@dataclass(frozen=True)
class ResolutionShift:
    """FlowLinspace with a shift e^mu that grows with the picture: mu linear in its number of tokens,

        mu = base_shift + (tokens - base_tokens) * (max_shift - base_shift) / (max_tokens - base_tokens).

    FLUX (black-forest-labs/flux, get_lin_function and time_shift) and SD3.5, in diffusers' names; kind="linear" takes
    mu itself as the shift.
    """

    flow: FlowLinspace
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    kind: Literal["exponential", "linear"] = "exponential"

    def mu(self, tokens: int) -> float:
        """See the class."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + (tokens - self.base_tokens) * slope

    def for_tokens(self, tokens: int) -> FlowLinspace:
        """The spacing for a picture of that many tokens."""
        return self.with_mu(self.mu(tokens))

    def with_mu(self, mu: float) -> FlowLinspace:
        """The spacing for a mu that is known already."""
        return replace(self.flow, shift=math.exp(mu) if self.kind == "exponential" else mu)

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Raises ValueError: the number of tokens decides, so ask NoiseScheduler.grid(steps, tokens)."""
        raise ValueError("this grid depends on the picture's size; ask for it with a number of tokens")


@dataclass(frozen=True)
class Leading:
    """t = i * (N // n) + steps_offset, i = n - 1 ... 0. For discrete paths; DDPM, DDIM and Stable Diffusion.

    Lin et al. 2023 (arXiv 2305.08891), table 2. The last row is `end`: "clean" is diffusers' set_alpha_to_one,
    "t_min" its alpha-bar of index 0. spare_row strides by N // (n + 1) and drops the row nearest to the data, as
    diffusers' DPM-Solver, UniPC and DEIS do.
    """

    steps_offset: int = 0
    end: End = "clean"
    spare_row: bool = False

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        total = _count_trained_timesteps(path, steps)
        first = 1 if self.spare_row else 0
        t = torch.arange(steps - 1 + first, first - 1, -1) * (total // (steps + first)) + self.steps_offset
        if not 0 <= int(t[-1]) <= int(t[0]) <= total - 1:
            raise ValueError(
                f"steps={steps} with steps_offset={self.steps_offset} asks for timesteps {int(t[0])} to {int(t[-1])}, "
                f"outside 0 to {total - 1}; lower steps, or set steps_offset=0"
            )
        return grid_at(path, t, self.end)


@dataclass(frozen=True)
class Trailing:
    """t = round(N - i * N / n) - 1, i = 0 ... n - 1, so the first step is at the noisiest index. For discrete paths.

    Lin et al. 2023 (arXiv 2305.08891), table 2. stride_target lets first-order steps land at t - N // n, which is not
    the next row where n does not divide N (diffusers' DDIM; 2 % off at n = 30).
    """

    end: End = "clean"
    stride_target: bool = False

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        total = _count_trained_timesteps(path, steps)
        stride = total - (total - total / steps)  # the rounding of numpy's arange, so that ties fall as diffusers' do
        t = torch.round(total - torch.arange(steps, dtype=torch.float64) * stride) - 1
        grid = grid_at(path, t, self.end)
        return _with_stride_landing(grid, total) if self.stride_target else grid


def _with_stride_landing(grid: Grid, total: int) -> Grid:
    """The same rows, with first-order steps landing a whole stride further whatever the next row is."""
    landing_t = grid.t[:-1] - total // grid.steps
    landing_t[landing_t < 0] = math.nan  # the last row, whatever it is
    return replace(grid, landing_t=landing_t)


@dataclass(frozen=True)
class Linspace:
    """t even from t_max to t_min, both included, then `end`. For discrete paths.

    Lin et al. 2023 (arXiv 2305.08891), table 2. integer=True rounds to trained indices (DDIM); False keeps fractions
    (Euler). A single step is taken at t_max. spare_row cuts one row more and drops t_min, as diffusers' DPM-Solver,
    UniPC and DEIS do. stride_target lets first-order steps land at t - N // n, as diffusers' DDIM does.
    """

    integer: bool = False
    end: End = "clean"
    spare_row: bool = False
    stride_target: bool = False

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        total = _count_trained_timesteps(path, steps)
        rows = steps + 1 if self.spare_row else steps
        stride = (path.t_max - path.t_min) / max(rows - 1, 1)  # multiplied out as numpy does, so that ties round alike
        t = path.t_min + torch.arange(rows - 1, rows - 1 - steps, -1, dtype=torch.float64) * stride
        t[0] = path.t_max
        grid = grid_at(path, t.round() if self.integer else t, self.end)
        return _with_stride_landing(grid, total) if self.stride_target else grid


@dataclass(frozen=True)
class UniformTime:
    """t even from the path's t_max to its t_min in n rows, then `end`. For paths in continuous time.

    Song et al. 2021 (arXiv 2011.13456), appendix E. t_last replaces t_min. geometric_sigma is the convention of NCSN++
    (VE): the steps use sigma even in its logarithm from sigma_max to sigma_min, while the network is told sigma(t).
    """

    end: End = "clean"
    t_last: float | None = None
    geometric_sigma: bool = False

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        last = path.t_min if self.t_last is None else self.t_last
        t = torch.linspace(path.t_max, last, _check_steps(steps), dtype=torch.float64)
        grid = grid_at(path, t, self.end)
        if not self.geometric_sigma:
            return grid
        sigma = grid.sigma.clone()
        sigma[:-1] = path.sigma(torch.linspace(path.t_max, 0.0, steps, dtype=torch.float64))
        return replace(grid, sigma=sigma)


LevelKind = Literal["ratio", "flow"]


def _level_range(
    path: NoisePath, level_kind: LevelKind, low: float | None, high: float | None, name: str
) -> tuple[float, float]:
    """The ends that a spacing of levels goes between: as given, or the path's own at t_min and t_max."""
    if level_kind == "flow":
        return (low if low is not None else 1e-3), (high if high is not None else 1.0)
    if high is None and path.alpha(path.t_max) <= 0:
        raise ValueError(f"{name} spacing needs a finite sigma / alpha, and this path reaches alpha = 0; use linspace")
    high = high if high is not None else path.sigma(path.t_max) / path.alpha(path.t_max)
    low = low if low is not None else path.sigma(path.t_min) / path.alpha(path.t_min)
    if not 0 < low < high:
        raise ValueError(f"{name} spacing needs 0 < sigma_min < sigma_max, got {low} and {high}")
    return low, high


def _grid_at_levels(path: NoisePath, level_kind: LevelKind, levels: Tensor, end: End) -> Grid:
    """Rows at levels of sigma / alpha ("ratio"), or of sigma / (alpha + sigma), a flow's own sigma ("flow")."""
    return grid_at(path, path.t_of(levels / (1 - levels) if level_kind == "flow" else levels), end)


@dataclass(frozen=True)
class Karras:
    """level_i = (max^(1/rho) + i / (n - 1) * (min^(1/rho) - max^(1/rho)))^rho, then `end`.

    Karras et al. 2022 (arXiv 2206.00364), equation 5. A level is sigma / alpha, max and min the path's own at t_max and
    t_min unless given; on a flow path (of="flow") it is sigma itself, from 1 to 0.001. Raises ValueError on a path that
    reaches alpha = 0 when the level is a ratio.
    """

    rho: float = 7.0
    sigma_min: float | None = None
    sigma_max: float | None = None
    end: End = "clean"
    level_kind: LevelKind = "ratio"

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        if self.rho <= 0:
            raise ValueError(f"karras spacing needs rho > 0, got {self.rho}")
        low, high = _level_range(path, self.level_kind, self.sigma_min, self.sigma_max, "karras")
        ramp = torch.linspace(0, 1, _check_steps(steps), dtype=torch.float64)
        levels = (high ** (1 / self.rho) + ramp * (low ** (1 / self.rho) - high ** (1 / self.rho))) ** self.rho
        return _grid_at_levels(path, self.level_kind, levels, self.end)


@dataclass(frozen=True)
class Exponential:
    """Levels even in their logarithm from max to min, then `end`; what a level is, see Karras.

    k-diffusion's get_sigmas_exponential.
    """

    sigma_min: float | None = None
    sigma_max: float | None = None
    end: End = "clean"
    level_kind: LevelKind = "ratio"

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        low, high = _level_range(path, self.level_kind, self.sigma_min, self.sigma_max, "exponential")
        levels = torch.linspace(math.log(high), math.log(low), _check_steps(steps), dtype=torch.float64).exp()
        levels[0] = high  # the logarithm and back is not exact, and a flow's 1 must stay 1
        return _grid_at_levels(path, self.level_kind, levels, self.end)


@dataclass(frozen=True)
class Beta:
    """level_i = min + q(1 - i / (n - 1)) * (max - min), q the quantile of Beta(a, b); levels as in Karras.

    Lee et al. 2024 (arXiv 2407.12173), with a = b = 0.6.
    """

    a: float = 0.6
    b: float = 0.6
    sigma_min: float | None = None
    sigma_max: float | None = None
    end: End = "clean"
    level_kind: LevelKind = "ratio"

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        from scipy.stats import beta  # half a second to import, and only this spacing needs it

        low, high = _level_range(path, self.level_kind, self.sigma_min, self.sigma_max, "beta")
        quantile = beta.ppf(1 - np.linspace(0, 1, _check_steps(steps)), self.a, self.b)
        return _grid_at_levels(path, self.level_kind, torch.from_numpy(low + quantile * (high - low)), self.end)


@dataclass(frozen=True)
class Custom:
    """The given levels, noise first, then `end`; what a level is, see Karras. Raises ValueError for another count."""

    sigmas: tuple[float, ...]
    end: End = "clean"
    level_kind: LevelKind = "ratio"

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in itertools.pairwise(self.sigmas))
        if (
            not self.sigmas
            or min(self.sigmas) <= 0
            or not falling
            or (self.level_kind == "flow" and self.sigmas[0] > 1)
        ):
            raise ValueError(f"sigmas={list(self.sigmas)}; give falling numbers above 0 (at most 1 for a flow)")

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        if steps != len(self.sigmas):
            raise ValueError(
                f"steps={steps}, but {len(self.sigmas)} sigmas are given; ask for {len(self.sigmas)} steps"
            )
        return _grid_at_levels(path, self.level_kind, torch.tensor(self.sigmas, dtype=torch.float64), self.end)


@dataclass(frozen=True)
class Distilled:
    """Rows picked evenly from the `original_steps` indices that a consistency model was distilled on, noise first.

    t = k * (N // original_steps) - 1, k = original_steps ... 1; row i is the floor(i * original_steps / n)-th of them.
    Luo et al. 2023 (arXiv 2310.04378), in the convention of diffusers' LCMScheduler.
    """

    original_steps: int = 50
    end: End = "clean"

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        if _check_steps(steps) > self.original_steps:
            raise ValueError(
                f"steps={steps} of a model distilled on {self.original_steps}; ask for {self.original_steps} or fewer"
            )
        total = round(path.t_max - path.t_min) + 1
        trained = torch.arange(self.original_steps, 0, -1) * (total // self.original_steps) - 1
        picked = np.floor(np.linspace(0, self.original_steps, steps, endpoint=False)).astype(np.int64)
        return grid_at(path, trained[torch.from_numpy(picked)], self.end)


@dataclass(frozen=True)
class TimestepMap:
    """Another spacing, whose rows tell the network something else: tau rounded, cut (truncated towards 0), or replaced.

    diffusers' DPM-Solver and UniPC hand the network integers where sigma / alpha falls between trained indices; its
    Euler with timestep_type="continuous" hands it log(sigma / alpha) / 4 ("log_sigma", 0 at the clean end).
    """

    spacing: "Spacing"
    how: Literal["round", "floor", "log_sigma"] = "round"

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        grid = self.spacing.grid(path, steps)
        if self.how == "log_sigma":
            log_sigma = (grid.sigma / grid.alpha).log() / 4
            return replace(grid, tau=torch.where(grid.sigma > 0, log_sigma, torch.zeros_like(log_sigma)))
        return replace(grid, tau=grid.tau.round() if self.how == "round" else grid.tau.trunc())
