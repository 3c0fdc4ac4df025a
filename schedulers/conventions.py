"""Spacings around another spacing: published conventions that change where its ends are, or one of its columns."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from schedulers.grid import Grid
from schedulers.paths import NoisePath
from schedulers.spacing import Beta, Exponential, FlowLinspace, Karras, ResolutionShift, Spacing, TimestepMap


@dataclass(frozen=True)
class RespacedLevels:
    """Levels between the first and the last row (the end left out) of another spacing, where they give no ends.

    diffusers' Euler, Heun, KDPM2 and LMS cut the trained timesteps first (timestep_spacing) and spread karras,
    exponential or beta levels over what is left; its FlowMatchEuler does so with the shifted sigmas.
    """

    spacing: Spacing
    levels: Karras | Exponential | Beta

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        rows = self.spacing.grid(path, steps)
        first, last = rows[0], rows[steps - 1]
        high, low = self.levels.sigma_max, self.levels.sigma_min
        if self.levels.level_kind == "flow":
            ends = (first.sigma / (first.alpha + first.sigma), last.sigma / (last.alpha + last.sigma))
        else:
            ends = (first.ratio, last.ratio)
        levels = replace(
            self.levels, sigma_max=ends[0] if high is None else high, sigma_min=ends[1] if low is None else low
        )
        return levels.grid(path, steps)


@dataclass(frozen=True)
class InitStdOverride:
    """Another spacing with its own deviation of the first noise.

    "sigma" is that of the noise alone, "state" sqrt(alpha^2 + sigma^2), that of the whole state for unit data, and
    "unit" 1. diffusers' samplers in x / alpha use "state" with `leading` timesteps and "sigma" with the others.
    """

    spacing: Spacing
    std: Literal["sigma", "state", "unit"]

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        grid = self.spacing.grid(path, steps)
        first = grid[0]
        std = {"sigma": first.sigma, "state": math.hypot(first.alpha, first.sigma), "unit": 1.0}[self.std]
        return replace(grid, init_std=std)


@dataclass(frozen=True)
class RowsFromPath:
    """Another spacing cut on a path of its own, while points between rows stay those of the scheduler's path.

    diffusers' KDPM2 interpolates sigma / alpha for its rows and the logarithm of it for its midpoints.
    """

    spacing: Spacing
    row_path: NoisePath

    def grid(self, path: NoisePath, steps: int) -> Grid:
        """See the class."""
        return replace(self.spacing.grid(self.row_path, steps), path=path)


def replace_innermost(spacing: Spacing, change: Callable[[Spacing], Spacing]) -> Spacing:
    """The same nest of spacings with `change` applied to the one that holds no other."""
    if isinstance(spacing, RespacedLevels | InitStdOverride | RowsFromPath | TimestepMap):
        return replace(spacing, spacing=replace_innermost(spacing.spacing, change))
    return change(spacing)


def for_tokens(spacing: Spacing, tokens: int) -> Spacing:
    """The same spacing for a picture of that many tokens."""
    return replace_innermost(
        spacing, lambda inner: inner.for_tokens(tokens) if isinstance(inner, ResolutionShift) else inner
    )


def with_even_sigmas(spacing: Spacing) -> Spacing:
    """The same spacing of a flow with its unshifted sigmas even from 1 to 1 / steps."""

    def change(inner: Spacing) -> Spacing:
        if isinstance(inner, ResolutionShift):
            return replace(inner, flow=replace(inner.flow, sigma_last=None))
        return replace(inner, sigma_last=None) if isinstance(inner, FlowLinspace) else inner

    return replace_innermost(spacing, change)
