"""Repeats to a row: median, mean, percentiles and a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


class Summary(msgspec.Struct, frozen=True):
    """Statistics of n measurements. `ci95` is the bootstrap interval of the median (percentile method, 2,000
    resamples).
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
    low, high = np.quantile(np.median(resampled, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
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
