"""The ratio of two medians: its interval holds the spread of both samples, and of runs that differ."""

import numpy as np
import pytest

from harness.metrics.unpaired import median_ratio, resampled_medians


def test_equal_measurements_have_an_interval_of_no_width() -> None:
    assert median_ratio([[2.0] * 6], [[1.0] * 5]) == (2.0, (2.0, 2.0))


def test_the_interval_is_that_of_the_exact_bootstrap() -> None:
    # of 5 values, the median of a resample is the smallest with P(B(5, 1/5) >= 3) = 181 / 3125
    medians = resampled_medians([[1.0, 2.0, 3.0, 4.0, 5.0]], np.random.default_rng(0))
    assert np.mean(medians == 1.0) == pytest.approx(181 / 3125, abs=0.01)
    assert np.mean(medians == 5.0) == pytest.approx(181 / 3125, abs=0.01)
    assert median_ratio([[1.0, 2.0, 3.0, 4.0, 5.0]], [[1.0] * 4]) == (3.0, (1.0, 5.0))
    assert median_ratio([[1.0, 2.0, 3.0, 4.0, 5.0]], [[1.0] * 4], level=0.8) == (3.0, (2.0, 4.0))


def test_runs_that_differ_widen_the_interval() -> None:
    runs = [[1.0] * 4, [1.0] * 7, [2.0] * 4, [2.0] * 4]
    pooled = [[value for run in runs for value in run]]
    several, one = median_ratio(runs, [[1.0] * 4])[1], median_ratio(pooled, [[1.0] * 4])[1]
    assert several == (1.0, 2.0)
    assert one is not None
    assert one[1] - one[0] <= 1.0
    steady = median_ratio([[1.0, 1.1] * 10] * 4, [[1.0] * 4])[1]
    assert steady is not None
    assert steady[1] < 1.2


def test_fewer_than_four_measurements_have_no_interval() -> None:
    assert median_ratio([[1.0] * 3], [[1.0] * 9]) == (1.0, None)
    assert median_ratio([[1.0] * 2, [1.0] * 2], [[1.0] * 9])[1] is not None
