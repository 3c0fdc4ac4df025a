"""Statistics of repeats: median, mean, percentiles and an interval.

Repeats that follow one another are alike, because disturbances of a machine last longer than one of them (in benches
here, neighbours correlate by 0.2 to 0.7). An interval that assumes independence would contain the median three times
of four, not nineteen of twenty. So the interval is the wider of two: the bootstrap's, and that of the medians of four
consecutive batches, which a slow drift separates.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
BATCHES = 4
STUDENT = 3.182  # the 97.5 % quantile of Student's t with 3 degrees of freedom, for the mean of four


class Summary(msgspec.Struct, frozen=True):
    """Statistics of n measurements in their order.

    `ci95` is an interval of the median: the wider of the bootstrap's (percentile method, 2,000 resamples) and
    `batch_half_interval`. It does not contain what changes from run to run.
    """

    n: int
    median: float
    mean: float
    p90: float
    p99: float
    iqr: float
    ci95: tuple[float, float]


def summarize(values: Sequence[float]) -> Summary:
    """Return the statistics of at least one value.

    Args:
        values: Measurements in their order.

    Returns:
        The statistics.

    Raises:
        ValueError: There are no values.
    """
    if not len(values):
        raise ValueError("nothing was measured; task.repeats must be at least 1")
    x = np.asarray(values, dtype=float)
    resampled = np.random.default_rng(0).choice(x, size=(RESAMPLES, len(x)))
    bounds = np.quantile(np.median(resampled, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    half = batch_half_interval(x)
    low, high = min(bounds[0], np.median(x) - half), max(bounds[1], np.median(x) + half)
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


def batch_half_interval(x: NDArray[np.floating]) -> float:
    """Return half the interval of the median, by the medians of four consecutive batches.

    Batches are less alike than neighbours, and a drift during the measurement separates them.

    Source: batch means, Conway 1963.

    Args:
        x: Measurements in their order, (n,).

    Returns:
        Half the width of the interval; 0 for fewer than four values.
    """
    if len(x) < BATCHES:
        return 0.0
    medians = [np.median(batch) for batch in np.array_split(x, BATCHES)]
    return float(STUDENT * np.std(medians, ddof=1) / np.sqrt(BATCHES))
