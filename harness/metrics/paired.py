"""By what factor two things measured in alternation differ, and whether the measurements can tell.

Of n rounds, each with one time of A and one of B, the logarithms d_i = ln(a_i / b_i) lie symmetrically about ln r,
whatever the noise, if A and B take turns at going first. The estimate of ln r is the median of the Walsh averages
(d_i + d_j) / 2, i <= j. Its interval is the exact one of Wilcoxon's signed-rank statistic. No normal distribution is
assumed, and one disturbed round does not move it far. Source: Hodges and Lehmann 1963 ("Estimates of location based on
rank tests"); Hollander, Wolfe and Chicken 2014 (Nonparametric Statistical Methods, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

LEVEL = 0.99  # two equal things differ in one of a hundred comparisons
POWER_Z = 0.8416 / 2.5758  # normal quantiles of 80 % and of LEVEL's upper end


class Ratio(msgspec.Struct, frozen=True):
    """How many times as long A takes as B: the speed-up of B over A.

    Attributes:
        n: Number of rounds.
        a_ms: Median time of A, ms.
        b_ms: Median time of B, ms.
        ratio: Time of A over time of B.
        interval: Interval of the ratio at `level`.
        level: Confidence level of the interval.
        differs: Whether the interval excludes 1.
        detectable: Smallest difference, as a share, that n rounds of this spread find in four of five comparisons.
    """

    n: int
    a_ms: float
    b_ms: float
    ratio: float
    interval: tuple[float, float]
    level: float
    differs: bool
    detectable: float


def min_rounds(level: float = LEVEL) -> int:
    """Return the rounds below which no interval has the level: 2^(1 - n) is the error rate of the widest interval."""
    return math.ceil(1 - math.log2(1 - level))


def ratio(a_ms: Sequence[float], b_ms: Sequence[float], level: float = LEVEL) -> Ratio:
    """Return A over B, from times of the same rounds in the same order.

    Args:
        a_ms: Times of A, ms.
        b_ms: Times of B, ms.
        level: Confidence level of the interval.

    Returns:
        The ratio with its interval.

    Raises:
        ValueError: There are too few rounds for an interval of this level.
    """
    n = len(a_ms)
    if n < (fewest := min_rounds(level)):
        raise ValueError(f"task.repeats={n}: an interval at {100 * level:.0f} % needs {fewest} rounds or more")
    a, b = np.asarray(a_ms, dtype=float), np.asarray(b_ms, dtype=float)
    walsh = walsh_averages(np.log(a / b))
    rank = outer_rank(n, level)
    low, high = float(walsh[rank - 1]), float(walsh[-rank])
    return Ratio(
        n=n,
        a_ms=float(np.median(a)),
        b_ms=float(np.median(b)),
        ratio=math.exp(float(np.median(walsh))),
        interval=(math.exp(low), math.exp(high)),
        level=level,
        differs=low > 0 or high < 0,
        detectable=math.expm1((high - low) / 2 * (1 + POWER_Z)),
    )


def walsh_averages(d: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (d_i + d_j) / 2 for all i <= j, sorted: n (n + 1) / 2 values."""
    i, j = np.triu_indices(len(d))
    return np.sort((d[i] + d[j]) / 2)


def outer_rank(n: int, level: float) -> int:
    """Return the rank k of the Walsh averages that enclose the centre with at least `level`.

    These are the k-th smallest and the k-th largest. k is the largest number with P(T <= k - 1) <= (1 - level) / 2,
    where T is the sum of a random subset of the ranks 1 .. n.

    Args:
        n: Number of rounds.
        level: Confidence level.

    Returns:
        The rank k, from 1.
    """
    counts = [1] + [0] * (n * (n + 1) // 2)  # subsets of the ranks by their sum, counted exactly
    for step in range(1, n + 1):
        for total in range(len(counts) - 1, step - 1, -1):
            counts[total] += counts[total - step]
    misses, k = 0, 0
    while 2 * (misses + counts[k]) <= (1 - level) * 2**n:
        misses += counts[k]
        k += 1
    return k
