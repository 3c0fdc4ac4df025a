"""95 % intervals at small numbers: Wilson's for a share, the percentile bootstrap over groups for everything else.

A bootstrap of fewer than 4 groups is no interval: of one group it has no width. So none is stated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import msgspec
import numpy as np
from numpy.typing import NDArray

from harness.metrics.summary import FEWEST, LEVEL

RESAMPLES = 2000
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


class Share(msgspec.Struct, frozen=True):
    """`hits` of `n` as a value in [0, 1]; `ci95` is Wilson's interval, which assumes that the n are independent."""

    hits: int
    n: int
    value: float
    ci95: tuple[float, float]

    @property
    def bounds(self) -> tuple[float, float]:
        """The ends of the interval."""
        return self.ci95


class IntervalEstimate(msgspec.Struct, frozen=True):
    """A number and its 95 % interval; `n` is the number of values it was computed from.

    `ci95` is None for fewer than 4 independent values or groups.
    """

    value: float
    ci95: tuple[float, float] | None
    n: int

    @property
    def bounds(self) -> tuple[float, float]:
        """The ends of the interval, both the value itself if there is none."""
        return self.ci95 or (self.value, self.value)


def wilson(hits: int, n: int) -> Share:
    """Return Wilson's score interval: the shares p with ``|hits / n - p| <= z sqrt(p (1 - p) / n)`` (Wilson 1927).

    Args:
        hits: Number of hits.
        n: Number of trials.

    Returns:
        The share with its interval.

    Raises:
        ValueError: hits is not between 0 and n, or n is 0.
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"{hits} hits of {n}")
    share, shrink = hits / n, 1 + Z**2 / n
    centre = (share + Z**2 / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Share(hits, n, share, (0.0 if hits == 0 else centre - half, 1.0 if hits == n else centre + half))


def resample(groups: int, count: int = RESAMPLES) -> NDArray[np.int64]:
    """Return how often each of `groups` groups is sampled, (count, groups): bootstrap samples as multiplicities."""
    return np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), size=count)


def resample_blocks(groups: int, count: int = RESAMPLES) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of `resample` in blocks that stay small however many groups there are.

    Args:
        groups: Number of groups.
        count: Number of bootstrap samples.

    Yields:
        Multiplicities (at most 50, groups).
    """
    random, shares = np.random.default_rng(0), np.full(groups, 1 / groups)
    for start in range(0, count, 50):
        yield random.multinomial(groups, shares, size=min(50, count - start))


def interval(values: NDArray[np.floating], n: int) -> tuple[float, float] | None:
    """Return the middle 95 % of bootstrap values, or None if they come from fewer than 4 independent measurements.

    Args:
        values: The statistic of each bootstrap sample.
        n: Number of independent measurements that were sampled.

    Returns:
        The interval.
    """
    if n < FEWEST:
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def median(values: Sequence[float], group: Sequence[int]) -> IntervalEstimate:
    """Return the median, with the interval of a bootstrap over groups (images of one name are sampled together).

    Args:
        values: n measurements.
        group: Group of each measurement, numbered 0, 1, ... without gaps.

    Returns:
        The median and its interval.
    """
    x, of = np.asarray(values, dtype=float), np.asarray(group)
    order = np.argsort(x)
    groups = int(of.max()) + 1
    seen = resample(groups)[:, of[order]].cumsum(axis=1)
    middle = (seen >= seen[:, -1:] / 2).argmax(axis=1)  # the weighted median, the lower one of two
    return IntervalEstimate(float(np.median(x)), interval(x[order][middle], groups), len(x))
