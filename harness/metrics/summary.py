"""Statistics of repeats: median, mean, percentiles, and the range or an interval of the median.

The interval lies between two of the measurements, so it is positive for durations and contains the median. It assumes
no distribution (Hahn and Meeker 1991, Statistical Intervals, section 5.3): of n independent measurements, the k-th
smallest and the k-th largest enclose the median with probability 1 - 2 P(B <= k - 1), where B is binomial (n, 1/2).

Repeats that follow one another are alike, because disturbances of a machine last longer than one of them (in benches
here, neighbours correlate by 0.2 to 0.7). Then that interval is too narrow. So it is widened, at most to the smallest
and largest measurement, by the medians of four consecutive batches, which a slow drift separates. In simulations it
then contains the median this often:

| n | independent | neighbours correlate by 0.6 |
|---|---|---|
| 4 | 0.88 | 0.64 |
| 5 | 0.94 | 0.73 |
| 6 | 0.97 | 0.79 |
| 8 | 0.99 | 0.88 |
| 20 | 0.98 | 0.92 |
| 40 | 0.99 | 0.94 |
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, lgamma, log

import msgspec
import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
BATCHES = 4
STUDENT = 3.182  # the 97.5 % quantile of Student's t with 3 degrees of freedom, for the mean of four
FEWEST = 4  # measurements below which no interval is stated


class Summary(msgspec.Struct, frozen=True):
    """Statistics of n measurements in their order.

    Attributes:
        n: Number of measurements.
        median: Median.
        mean: Mean.
        p90: 90th percentile.
        p99: 99th percentile.
        iqr: Distance between the quartiles.
        ci95: Interval of the median, nominally 95 %; None for fewer than 4 measurements, which have a range only. It
            does not contain what changes from run to run.
        range: Smallest and largest measurement; None in a record from before it was written.
        coverage: Probability that `ci95` contains the median of independent measurements: 0.875 for 4, 0.9375 for 5, at
            least 0.95 from 6 on. None without `ci95`, and in a record from before it was written.
    """

    n: int
    median: float
    mean: float
    p90: float
    p99: float
    iqr: float
    ci95: tuple[float, float] | None
    range: tuple[float, float] | None = None
    coverage: float | None = None

    @property
    def spread(self) -> tuple[float, float]:
        """The interval of the median, or the range if there is no interval."""
        return self.ci95 or self.range or (self.median, self.median)

    @property
    def spread_name(self) -> str:
        """The name of `spread`: `95 %`, with few measurements the lower level that they reach, or `range`."""
        if self.ci95 is None:
            return "range"
        return f"{100 * min(LEVEL, self.coverage or LEVEL):.0f} %"


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
    p25, p75, p90, p99 = np.quantile(x, [0.25, 0.75, 0.9, 0.99])
    interval, coverage = median_interval(x) if len(x) >= FEWEST else (None, None)
    return Summary(
        n=len(x),
        median=float(np.median(x)),
        mean=float(x.mean()),
        p90=float(p90),
        p99=float(p99),
        iqr=float(p75 - p25),
        ci95=interval,
        range=(float(x.min()), float(x.max())),
        coverage=coverage,
    )


def median_interval(x: NDArray[np.floating]) -> tuple[tuple[float, float], float]:
    """Return the interval of the median between two of the measurements, and its coverage.

    Args:
        x: Measurements in their order, (n,).

    Returns:
        The interval, and the probability with which it contains the median if the measurements are independent.
    """
    k, coverage = order_statistics(len(x))
    ordered, half = np.sort(x), batch_half_interval(x)
    median = float(np.median(x))
    low, high = min(ordered[k - 1], median - half), max(ordered[-k], median + half)
    return (float(max(low, ordered[0])), float(min(high, ordered[-1]))), coverage


def order_statistics(n: int) -> tuple[int, float]:
    """Return the rank k whose k-th smallest and k-th largest value enclose the median with `LEVEL`, and the coverage.

    Args:
        n: Number of independent measurements.

    Returns:
        The largest such k, or 1 if n is too small for the level, and 1 - 2 P(B <= k - 1).
    """
    k, coverage, outside = 1, 1 - 2.0 ** (1 - n), 2.0**-n
    for rank in range(1, n // 2):
        outside += exp(lgamma(n + 1) - lgamma(rank + 1) - lgamma(n - rank + 1) - n * log(2))
        if 1 - 2 * outside < LEVEL:
            break
        k, coverage = rank + 1, 1 - 2 * outside
    return k, coverage


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
