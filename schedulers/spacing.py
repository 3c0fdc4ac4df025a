"""Where along a path the steps are taken: path and number of steps -> Grid."""

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
    """A rule that chooses the points for a number of steps."""

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Return the grid of a path for a number of steps.

        Args:
            path: The noise path.
            steps: The number of steps, at least 1.

        Returns:
            The grid of steps + 1 rows, noise first.

        Raises:
            ValueError: The path has no grid with that many steps.
        """


def grid_at(path: NoisePath, t: Tensor, end: End | float = "clean") -> Grid:
    """Return the grid with one row at each time of t, and a last row.

    Args:
        path: The noise path.
        t: The falling times of the network evaluations, shape (steps,), float64.
        end: The last row. "clean" is alpha = 1, sigma = 0. "t_min" is the path's own t_min, where some noise is left.
            "repeat" is the row before it again, so that the last step changes nothing (diffusers' DEIS). A number is
            its time.

    Returns:
        The grid of steps + 1 rows.
    """
    t = t.to(torch.float64)
    ends = {"clean": path.t_of(0.0), "t_min": path.t_min, "repeat": float(t[-1])}
    last = torch.tensor([ends[end] if isinstance(end, str) else end], dtype=torch.float64)
    t = torch.cat([t, last])
    alpha, sigma = path.alpha(t), path.sigma(t)
    if end == "clean":
        alpha[-1], sigma[-1] = 1.0, 0.0
    return Grid(t, alpha, sigma, path.tau(t), path.c_in(t), path.init_std(float(t[0])), path)


def _check_steps(steps: int) -> int:
    """Return `steps` after checking that it is at least 1."""
    if steps < 1:
        raise ValueError(f"steps={steps}; use at least 1")
    return steps


def _count_trained_timesteps(path: NoisePath, steps: int, spare_row: bool = False) -> int:
    """Return the number of trained timesteps of the path, after checking that it has a different one for each row."""
    total = round(path.t_max - path.t_min) + 1
    most = total - 1 if spare_row else total
    if _check_steps(steps) > most:
        spare = ", one of them spare" if spare_row else ""
        raise ValueError(f"steps={steps} on a path of {total} trained timesteps{spare}; use {most} or fewer")
    return total


@dataclass(frozen=True)
class FlowLinspace:
    """Even sigmas of a flow, shifted once by s * sigma / (1 + (s - 1) * sigma), then the last row.

    Esser et al. 2024 (arXiv 2403.03206), equation 23. diffusers' FlowMatchEulerDiscrete applies a static shift twice
    (issue 13243); sigma_last = shift * 0.001 / (1 + (shift - 1) * 0.001) reproduces that.

    Attributes:
        shift: The shift s, above 0; 1 keeps the sigmas even.
        sigma_last: The unshifted sigma of the last network evaluation. None means sigma_first / steps, all steps even,
            as FLUX does; 0.001 is the convention of diffusers' SD3.
        sigma_first: The unshifted sigma of the first evaluation.
        spare_row: Whether one more row is made and the last one dropped; sigma_last is then the dropped row (diffusers'
            DPM-Solver and UniPC).
        sigma_cap: The largest shifted sigma, for solvers that divide by alpha.
        terminal: The last shifted sigma; the others are stretched to fit (LTX-Video). None does not stretch. A single
            step is not stretched either: it starts at the first sigma.
        unshifted_sigmas: The unshifted sigmas, noise first, in place of even ones.
        end: The last row, as in `grid_at`.

    Raises:
        ValueError: A shift or sigma is out of range.
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
        """Return the grid of the shifted sigmas.

        Args:
            path: The noise path; on another than the flow path, sigma means sigma / (alpha + sigma).
            steps: The number of steps, at least 1.

        Returns:
            The grid of steps + 1 rows.

        Raises:
            ValueError: The last evaluation would be at sigma = 0, or the number of steps does not fit.
        """
        sigma = self._unshifted_rows(_check_steps(steps))
        if not sigma[-1] > 0:
            raise ValueError("the last network evaluation would be at sigma = 0; give sigma_last above 0, or spare_row")
        sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        if self.terminal is not None and steps > 1:
            sigma = 1 - (1 - sigma) / ((1 - sigma[-1]) / (1 - self.terminal))
        sigma = sigma.clamp(max=self.sigma_cap)
        if isinstance(path, FlowPath):  # its time is exactly sigma, and published samplers truncate 1000 sigma
            return grid_at(path, sigma, self.end)
        return grid_at(path, path.t_of(sigma / (1 - sigma)), self.end)

    def _unshifted_rows(self, steps: int) -> Tensor:
        if self.unshifted_sigmas is not None:
            if len(self.unshifted_sigmas) != steps:
                raise ValueError(
                    f"steps={steps}, but {len(self.unshifted_sigmas)} sigmas are given; give as many sigmas as steps"
                )
            return torch.tensor(self.unshifted_sigmas, dtype=torch.float64)
        last = self.sigma_first / steps if self.sigma_last is None else self.sigma_last
        rows = steps + 1 if self.spare_row else steps
        if last == 0:  # even in 1 - sigma, from the data: bit-equal to diffusers' DPM-Solver
            return torch.from_numpy(1 - np.linspace(1, 1 - self.sigma_first, rows)).flip(0)[:steps]
        return torch.from_numpy(np.linspace(self.sigma_first, last, rows))[:steps]


@dataclass(frozen=True)
class ResolutionShift:
    """FlowLinspace with a shift e^mu that grows with the resolution; mu is linear in the number of latent tokens.

        mu = base_shift + (tokens - base_tokens) * (max_shift - base_shift) / (max_tokens - base_tokens).

    FLUX (black-forest-labs/flux, get_lin_function and time_shift) and SD3.5, in diffusers' names.

    Attributes:
        flow: The spacing whose shift is replaced.
        base_shift: The mu at base_tokens.
        max_shift: The mu at max_tokens.
        base_tokens: The smaller number of latent tokens.
        max_tokens: The larger number of latent tokens.
        kind: The shift as a function of mu: "exponential" is e^mu, "linear" is mu itself.
    """

    flow: FlowLinspace
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    kind: Literal["exponential", "linear"] = "exponential"

    def mu(self, tokens: int) -> float:
        """Return mu for a number of latent tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + (tokens - self.base_tokens) * slope

    def for_tokens(self, tokens: int) -> FlowLinspace:
        """Return the spacing for a sample of that many latent tokens."""
        return self.with_mu(self.mu(tokens))

    def with_mu(self, mu: float) -> FlowLinspace:
        """Return the spacing for a given mu."""
        return replace(self.flow, shift=math.exp(mu) if self.kind == "exponential" else mu)

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Raise ValueError: the shift depends on the number of tokens, so call NoiseScheduler.grid(steps, tokens)."""
        raise ValueError("this grid depends on the image size; pass the number of tokens")


@dataclass(frozen=True)
class Leading:
    """Timesteps t = i * (N // n) + steps_offset, i = n - 1 ... 0. For discrete paths.

    Lin et al. 2023 (arXiv 2305.08891), table 2; DDPM, DDIM and Stable Diffusion.

    Attributes:
        steps_offset: The offset added to every timestep.
        end: The last row. "clean" is diffusers' set_alpha_to_one, "t_min" its alpha-bar of index 0.
        spare_row: Whether the stride is N // (n + 1) and the row nearest to the data is dropped, as diffusers'
            DPM-Solver, UniPC and DEIS do.
        past_end: Whether timesteps may lie above N - 1. Their noise level is that of N - 1, and the network gets the
            timestep as it is, as in diffusers' samplers that interpolate sigma / alpha (SDXL at 1000 steps).
        stride_target: Whether the last row is one stride below the others if a trained timestep is there (the offset
            is a stride or more), as in diffusers' DDIM and PNDM.
    """

    steps_offset: int = 0
    end: End = "clean"
    spare_row: bool = False
    past_end: bool = False
    stride_target: bool = False

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Return the grid of the leading timesteps.

        Args:
            path: A discrete path of N trained timesteps.
            steps: The number of steps n.

        Returns:
            The grid of steps + 1 rows.

        Raises:
            ValueError: A timestep is outside the trained ones.
        """
        total = _count_trained_timesteps(path, steps, self.spare_row)
        first = 1 if self.spare_row else 0
        t = torch.arange(steps - 1 + first, first - 1, -1) * (total // (steps + first)) + self.steps_offset
        if int(t[-1]) < 0 or (int(t[0]) > total - 1 and not self.past_end):
            raise ValueError(
                f"steps={steps} with steps_offset={self.steps_offset} gives timesteps {int(t[0])} to {int(t[-1])}, "
                f"outside 0 to {total - 1}; lower steps, or set steps_offset=0"
            )
        below = int(t[-1]) - total // steps
        return grid_at(path, t, float(below) if self.stride_target and below >= 0 else self.end)


@dataclass(frozen=True)
class Trailing:
    """Timesteps t = round(N - i * N / n) - 1, i = 0 ... n - 1, so the first is the noisiest. For discrete paths.

    Lin et al. 2023 (arXiv 2305.08891), table 2.

    Attributes:
        end: The last row, as in `grid_at`.
        stride_target: Whether first-order steps land at t - N // n, as in diffusers' DDIM. This is not the next row if
            n does not divide N (2 % off at n = 30).
    """

    end: End = "clean"
    stride_target: bool = False

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Return the grid of the trailing timesteps."""
        total = _count_trained_timesteps(path, steps)
        stride = total - (total - total / steps)  # rounds like numpy's arange, so that ties round as in diffusers
        t = torch.round(total - torch.arange(steps, dtype=torch.float64) * stride) - 1
        grid = grid_at(path, t, self.end)
        return _with_stride_landing(grid, total) if self.stride_target else grid


def _with_stride_landing(grid: Grid, total: int) -> Grid:
    """Return the same rows, with first-order steps that land one whole stride further, whatever the next row is."""
    landing_t = grid.t[:-1] - total // grid.steps
    landing_t[landing_t < 0] = math.nan  # NaN lands at the next row, whatever that is
    return replace(grid, landing_t=landing_t)


@dataclass(frozen=True)
class Linspace:
    """Timesteps even from t_max to t_min, both included. For discrete paths.

    Lin et al. 2023 (arXiv 2305.08891), table 2. A single step is taken at t_max.

    Attributes:
        integer: Whether timesteps are rounded to trained indices (DDIM). False keeps fractions (Euler).
        end: The last row, as in `grid_at`.
        spare_row: Whether one more row is made and t_min dropped, as diffusers' DPM-Solver, UniPC and DEIS do.
        stride_target: Whether first-order steps land at t - N // n, as in diffusers' DDIM.
    """

    integer: bool = False
    end: End = "clean"
    spare_row: bool = False
    stride_target: bool = False

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Return the grid of the even timesteps."""
        total = _count_trained_timesteps(path, steps)
        rows = steps + 1 if self.spare_row else steps
        stride = (path.t_max - path.t_min) / max(
            rows - 1, 1
        )  # computed like numpy's linspace, so that ties round alike
        t = path.t_min + torch.arange(rows - 1, rows - 1 - steps, -1, dtype=torch.float64) * stride
        t[0] = path.t_max
        grid = grid_at(path, t.round() if self.integer else t, self.end)
        return _with_stride_landing(grid, total) if self.stride_target else grid


@dataclass(frozen=True)
class UniformTime:
    """Times even from the path's t_max to its t_min in n rows. For paths in continuous time.

    Song et al. 2021 (arXiv 2011.13456), appendix E.

    Attributes:
        end: The last row, as in `grid_at`.
        t_last: The time of the last evaluation; None means the path's t_min.
        geometric_sigma: Whether the steps use sigmas even in their logarithm, from sigma_max to sigma_min, while the
            network is conditioned on sigma(t). This is the convention of NCSN++ (VE).
    """

    end: End = "clean"
    t_last: float | None = None
    geometric_sigma: bool = False

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Return the grid of the even times."""
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
    path: NoisePath, level_kind: LevelKind, low: float | None, high: float | None, name: str, steps: int
) -> tuple[float, float]:
    """Return the lowest and the highest level: as given, or the path's own at t_min and t_max.

    Args:
        path: The noise path.
        level_kind: The meaning of a level, see `_grid_at_levels`.
        low: The lowest level, or None for the path's own (0.001 for a flow).
        high: The highest level, or None for the path's own (1 for a flow).
        name: The name of the spacing, for the message.
        steps: The number of steps; the levels of a single step may be equal.

    Returns:
        The lowest and the highest level.

    Raises:
        ValueError: The path's highest ratio is infinite, or the levels are not 0 < low < high.
    """
    if level_kind == "flow":
        low, high = (low if low is not None else 1e-3), (high if high is not None else 1.0)
        return _rising(low, high, name, steps)
    if high is None and path.alpha(path.t_max) <= 0:
        raise ValueError(f"{name} spacing needs a finite sigma / alpha, and this path reaches alpha = 0; use linspace")
    high = high if high is not None else path.sigma(path.t_max) / path.alpha(path.t_max)
    low = low if low is not None else path.sigma(path.t_min) / path.alpha(path.t_min)
    return _rising(low, high, name, steps)


def _rising(low: float, high: float, name: str, steps: int) -> tuple[float, float]:
    """Return both levels after checking their order."""
    if not (0 < low < high or (_check_steps(steps) == 1 and 0 < low == high)):
        raise ValueError(f"{name} spacing needs 0 < sigma_min < sigma_max, got {low} and {high}")
    return low, high


def _grid_at_levels(path: NoisePath, level_kind: LevelKind, levels: Tensor, end: End) -> Grid:
    """Return the grid at levels of sigma / alpha ("ratio"), or sigma / (alpha + sigma) ("flow", a flow's sigma)."""
    return grid_at(path, path.t_of(levels / (1 - levels) if level_kind == "flow" else levels), end)


@dataclass(frozen=True)
class Karras:
    """Levels level_i = (max^(1/rho) + i / (n - 1) * (min^(1/rho) - max^(1/rho)))^rho, then the last row.

    Karras et al. 2022 (arXiv 2206.00364), equation 5.

    Attributes:
        rho: The exponent, above 0.
        sigma_min: The lowest level; None means the path's own at t_min, or 0.001 for a flow.
        sigma_max: The highest level; None means the path's own at t_max, or 1 for a flow.
        end: The last row, as in `grid_at`.
        level_kind: The meaning of a level: "ratio" is sigma / alpha, "flow" is sigma / (alpha + sigma), a flow's own
            sigma.
    """

    rho: float = 7.0
    sigma_min: float | None = None
    sigma_max: float | None = None
    end: End = "clean"
    level_kind: LevelKind = "ratio"

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Return the grid of the levels.

        Args:
            path: The noise path.
            steps: The number of steps, at least 1.

        Returns:
            The grid of steps + 1 rows.

        Raises:
            ValueError: rho or a level is out of range, or the level is a ratio and the path reaches alpha = 0.
        """
        if self.rho <= 0:
            raise ValueError(f"karras spacing needs rho > 0, got {self.rho}")
        low, high = _level_range(path, self.level_kind, self.sigma_min, self.sigma_max, "karras", steps)
        ramp = torch.linspace(0, 1, _check_steps(steps), dtype=torch.float64)
        levels = (high ** (1 / self.rho) + ramp * (low ** (1 / self.rho) - high ** (1 / self.rho))) ** self.rho
        levels[1:][-1:] = low  # powers are not exact, and the levels must not end below the path
        return _grid_at_levels(path, self.level_kind, levels, self.end)


@dataclass(frozen=True)
class Exponential:
    """Levels even in their logarithm from the highest to the lowest, then the last row.

    k-diffusion's get_sigmas_exponential.

    Attributes:
        sigma_min: The lowest level, as in `Karras`.
        sigma_max: The highest level, as in `Karras`.
        end: The last row, as in `grid_at`.
        level_kind: The meaning of a level, as in `Karras`.
    """

    sigma_min: float | None = None
    sigma_max: float | None = None
    end: End = "clean"
    level_kind: LevelKind = "ratio"

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Return the grid of the levels."""
        low, high = _level_range(path, self.level_kind, self.sigma_min, self.sigma_max, "exponential", steps)
        levels = torch.linspace(math.log(high), math.log(low), _check_steps(steps), dtype=torch.float64).exp()
        levels[1:][-1:] = low
        levels[0] = high  # log and exp are not exact, and a flow's 1 must stay 1
        return _grid_at_levels(path, self.level_kind, levels, self.end)


@dataclass(frozen=True)
class Beta:
    """Levels level_i = min + q(1 - i / (n - 1)) * (max - min), where q is the quantile function of Beta(a, b).

    Lee et al. 2024 (arXiv 2407.12173), with a = b = 0.6.

    Attributes:
        a: The first shape parameter of the distribution.
        b: The second shape parameter of the distribution.
        sigma_min: The lowest level, as in `Karras`.
        sigma_max: The highest level, as in `Karras`.
        end: The last row, as in `grid_at`.
        level_kind: The meaning of a level, as in `Karras`.
    """

    a: float = 0.6
    b: float = 0.6
    sigma_min: float | None = None
    sigma_max: float | None = None
    end: End = "clean"
    level_kind: LevelKind = "ratio"

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Return the grid of the levels."""
        from scipy.stats import beta  # takes half a second, and only this spacing needs it

        low, high = _level_range(path, self.level_kind, self.sigma_min, self.sigma_max, "beta", steps)
        quantile = beta.ppf(1 - np.linspace(0, 1, _check_steps(steps)), self.a, self.b)
        return _grid_at_levels(path, self.level_kind, torch.from_numpy(low + quantile * (high - low)), self.end)


@dataclass(frozen=True)
class Custom:
    """Levels given by the user, then the last row.

    Attributes:
        sigmas: The falling levels, noise first, above 0.
        end: The last row, as in `grid_at`.
        level_kind: The meaning of a level, as in `Karras`.

    Raises:
        ValueError: The levels do not fall, or one is out of range.
    """

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
        """Return the grid of the given levels.

        Args:
            path: The noise path.
            steps: The number of steps, equal to the number of levels.

        Returns:
            The grid of steps + 1 rows.

        Raises:
            ValueError: The number of steps differs from the number of levels.
        """
        if steps != len(self.sigmas):
            raise ValueError(f"steps={steps}, but {len(self.sigmas)} sigmas are given; use {len(self.sigmas)} steps")
        return _grid_at_levels(path, self.level_kind, torch.tensor(self.sigmas, dtype=torch.float64), self.end)


@dataclass(frozen=True)
class Distilled:
    """Rows picked evenly from the timesteps that a consistency model was distilled on, noise first.

    The timesteps are t = k * (N // original_steps) - 1, k = original_steps ... 1. Row i is number floor(i *
    original_steps / n) of them. Luo et al. 2023 (arXiv 2310.04378), in the convention of diffusers' LCMScheduler.

    Attributes:
        original_steps: The number of timesteps used in distillation.
        end: The last row, as in `grid_at`.
    """

    original_steps: int = 50
    end: End = "clean"

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Return the grid of the picked timesteps.

        Args:
            path: A discrete path of N trained timesteps.
            steps: The number of steps, at most original_steps.

        Returns:
            The grid of steps + 1 rows.

        Raises:
            ValueError: More steps are requested than the model was distilled on.
        """
        if _check_steps(steps) > self.original_steps:
            raise ValueError(
                f"steps={steps} of a model distilled on {self.original_steps}; use {self.original_steps} or fewer"
            )
        total = round(path.t_max - path.t_min) + 1
        trained = torch.arange(self.original_steps, 0, -1) * (total // self.original_steps) - 1
        picked = np.floor(np.linspace(0, self.original_steps, steps, endpoint=False)).astype(np.int64)
        return grid_at(path, trained[torch.from_numpy(picked)], self.end)


@dataclass(frozen=True)
class TimestepMap:
    """Another spacing whose rows pass another timestep (tau) to the network.

    diffusers' DPM-Solver and UniPC pass integers where sigma / alpha falls between trained indices. Its Euler with
    timestep_type="continuous" passes log(sigma / alpha) / 4.

    Attributes:
        spacing: The spacing that makes the rows.
        how: The map. "round" rounds tau, "floor" truncates it towards 0, and "log_sigma" replaces it by
            log(sigma / alpha) / 4, which is 0 at the clean end.
    """

    spacing: "Spacing"
    how: Literal["round", "floor", "log_sigma"] = "round"

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Return the inner spacing's grid with tau mapped."""
        grid = self.spacing.grid(path, steps)
        if self.how == "log_sigma":
            log_sigma = (grid.sigma / grid.alpha).log() / 4
            return replace(grid, tau=torch.where(grid.sigma > 0, log_sigma, torch.zeros_like(log_sigma)))
        return replace(grid, tau=grid.tau.round() if self.how == "round" else grid.tau.trunc())
