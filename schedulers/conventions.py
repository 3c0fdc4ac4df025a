"""Spacings that wrap another spacing: published conventions that change its ends or one of its columns."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from schedulers.grid import Grid
from schedulers.paths import NoisePath
from schedulers.spacing import Beta, Exponential, FlowLinspace, Karras, ResolutionShift, Spacing, TimestepMap


@dataclass(frozen=True)
class RespacedLevels:
    """Noise levels spread between the first and the last noisy row of another spacing.

    diffusers' Euler, Heun, KDPM2 and LMS choose the trained timesteps first (timestep_spacing). They then spread
    karras, exponential or beta levels over that range. Its FlowMatchEuler does the same with the shifted sigmas.

    Attributes:
        spacing: The spacing whose first and last noisy rows give the range.
        levels: The levels to spread; a sigma_min or sigma_max of its own replaces that end of the range.
    """

    spacing: Spacing
    levels: Karras | Exponential | Beta

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Return the grid of the levels over the range of the inner spacing."""
        rows = self.spacing.grid(path, steps)
        first, last = rows[0], rows[steps - 1]
        high, low = self.levels.sigma_max, self.levels.sigma_min
        if self.levels.level_kind == "flow":
            ends = (first.sigma / (first.alpha + first.sigma), last.sigma / (last.alpha + last.sigma))
        else:
            ends = (first.ratio, last.ratio)
        high, low = ends[0] if high is None else high, ends[1] if low is None else low
        low = min(low, high) if steps == 1 else low  # a single step takes the highest level alone
        return replace(self.levels, sigma_max=high, sigma_min=low).grid(path, steps)


@dataclass(frozen=True)
class InitStdOverride:
    """Another spacing with its own standard deviation of the first noise.

    diffusers' samplers in x / alpha use "state" with `leading` timesteps and "sigma" with the others.

    Attributes:
        spacing: The spacing that makes the rows.
        std: The rule for the standard deviation. "sigma" is the noise alone; "state" is sqrt(alpha^2 + sigma^2), the
            whole state for data of unit variance; "unit" is 1.
    """

    spacing: Spacing
    std: Literal["sigma", "state", "unit"]

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Return the inner spacing's grid with `init_std` replaced."""
        grid = self.spacing.grid(path, steps)
        first = grid[0]
        std = {"sigma": first.sigma, "state": math.hypot(first.alpha, first.sigma), "unit": 1.0}[self.std]
        return replace(grid, init_std=std)


@dataclass(frozen=True)
class RowsFromPath:
    """Another spacing whose rows come from a path of their own.

    Points between rows stay those of the scheduler's path. diffusers' KDPM2 interpolates sigma / alpha for its rows,
    and the logarithm of sigma / alpha for its midpoints.

    Attributes:
        spacing: The spacing that makes the rows.
        row_path: The path that the rows lie on.
    """

    spacing: Spacing
    row_path: NoisePath

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """Return the inner spacing's grid on `row_path`, with `path` for the points between rows."""
        return replace(self.spacing.grid(self.row_path, steps), path=path)


def replace_innermost(spacing: Spacing, change: Callable[[Spacing], Spacing]) -> Spacing:
    """Return the same nested spacings with the innermost one replaced by `change` of it."""
    if isinstance(spacing, RespacedLevels | InitStdOverride | RowsFromPath | TimestepMap):
        return replace(spacing, spacing=replace_innermost(spacing.spacing, change))
    return change(spacing)


def for_tokens(spacing: Spacing, tokens: int) -> Spacing:
    """Return the same spacing for a sample of that many latent tokens."""
    return replace_innermost(
        spacing, lambda inner: inner.for_tokens(tokens) if isinstance(inner, ResolutionShift) else inner
    )


def with_even_sigmas(spacing: Spacing) -> Spacing:
    """Return the same flow spacing with its unshifted sigmas even from 1 to 1 / steps."""

    def change(inner: Spacing) -> Spacing:
        if isinstance(inner, ResolutionShift):
            return replace(inner, flow=replace(inner.flow, sigma_last=None))
        return replace(inner, sigma_last=None) if isinstance(inner, FlowLinspace) else inner

    return replace_innermost(spacing, change)
