"""Repeats to a row: median, mean, percentiles and an interval.

Repeats that follow one another are alike, for what else a machine does lasts longer than one of them (in benches here,
neighbours correlate by 0.2 to 0.7). n of them then say as much as n (1 - r) / (1 + r) independent ones, and an interval
that took them for independent would hold the median three times of four, not nineteen of twenty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
FEWEST = 5  # from which neighbours are compared


class Summary(msgspec.Struct, frozen=True):
    """Statistics of n measurements in their order. `ci95` is the bootstrap interval of the median (percentile method,
    2,000 resamples), as much wider as neighbours are alike (`widened_by`). What changes from run to run is not in it.
    """

    n: int
    median: float
    mean: float
    p90: float
    p99: float
    iqr: float
    ci95: tuple[float, float]


def summarize(values: Sequence[float]) -> Summary:
    """The statistics of at least one value.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("nothing was measured; task.repeats must be at least 1")
    x = np.asarray(values, dtype=float)
    resampled = np.random.default_rng(0).choice(x, size=(RESAMPLES, len(x)))
    bounds = np.quantile(np.median(resampled, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = np.median(x) + widened_by(x) * (bounds - np.median(x))
    p25, p75, p90, p99 = np.quantile(x, [0.25, 0.75, 0.9, 0.99])
    return Summary(
        len(x),
        float(np.median(x)),
        float(x.mean()),
        float(p90),
        float(p99),
        float(p75 - p25),
        (float(low), float(high)),
    )


def widened_by(x: NDArray[np.floating]) -> float:
    """How much wider an interval of n measurements is than one of independent ones: sqrt((1 + r) / (1 - r)).

    r is the correlation of neighbours, taken for a first-order autoregression, its bias of -(1 + 3 r) / n removed;
    1 where there are too few to tell.

    Source: Bayley and Hammersley 1946 for the number of independent ones, Kendall 1954 for the bias.
    """
    n, apart = len(x), x - x.mean()
    squares = float(apart @ apart)
    if n < FEWEST or squares == 0:
        return 1.0
    r = (n * float(apart[:-1] @ apart[1:]) / squares + 1) / (n - 3)
    r = min(max(r, 0.0), 1 - 4 / n)
    return math.sqrt((1 + r) / (1 - r))
