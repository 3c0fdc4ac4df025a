"""By what factor two things differ that were measured apart, and whether the measurements can tell.

The ratio is that of the medians. Its interval is the percentile bootstrap of both samples. Of several runs, the runs
are sampled first and then the repeats of each, so that the interval holds what changes from run to run. Of one run it
cannot: harness.metrics.paired has a comparison in alternation, which needs no such assumption.

Source: Davison and Hinkley 1997 (Bootstrap Methods and their Application, sections 2.2 and 3.8).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from harness.metrics.intervals import IntervalEstimate
from harness.metrics.summary import FEWEST, LEVEL

RESAMPLES = 10_000  # enough for the tails of an interval at 99.9 %
BLOCK = 1_000_000  # values in memory at a time


def median_ratio(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], level: float = LEVEL
) -> tuple[float, tuple[float, float] | None]:
    """Return median(a) / median(b) with its interval.

    Args:
        a: Measurements of A, one sequence per run.
        b: Measurements of B, one sequence per run.
        level: Confidence level of the interval.

    Returns:
        The ratio, and its interval; None if A or B has fewer than 4 measurements.
    """
    value = float(np.median(np.concatenate(a)) / np.median(np.concatenate(b)))
    if min(sum(map(len, a)), sum(map(len, b))) < FEWEST:
        return value, None
    random = np.random.default_rng(0)
    ratios = resampled_medians(a, random) / resampled_medians(b, random)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return value, (float(low), float(high))


def ratio_of_medians(a: Sequence[float], b: Sequence[float]) -> IntervalEstimate:
    """Return median(a) / median(b) of one run each, with a 95 % interval from 4 measurements on."""
    value, interval = median_ratio([a], [b])
    return IntervalEstimate(value, interval, min(len(a), len(b)))


def resampled_medians(runs: Sequence[Sequence[float]], random: np.random.Generator) -> NDArray[np.float64]:
    """Return bootstrap medians: runs are sampled with replacement, then the measurements of each.

    Args:
        runs: Measurements, one sequence per run.
        random: Random generator.

    Returns:
        One median per resample.
    """
    lengths = np.array([len(run) for run in runs])
    widest = int(lengths.max())
    values = np.array([[*run, *[np.nan] * (widest - len(run))] for run in runs], dtype=float)
    size, medians = max(1, BLOCK // (len(runs) * widest)), []
    for start in range(0, RESAMPLES, size):
        count = min(size, RESAMPLES - start)
        chosen = random.integers(len(runs), size=(count, len(runs)))
        places = (random.random((count, len(runs), widest)) * lengths[chosen][..., None]).astype(int)
        sampled = np.take_along_axis(values[chosen], places, axis=2)
        medians.append(np.median(sampled.reshape(count, -1), axis=1))
    return np.concatenate(medians)
