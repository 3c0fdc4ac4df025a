"""The interval of a median lies between two of the measurements, and has the coverage that it states."""

import math

import numpy as np
import pytest

from harness.metrics.summary import LEVEL, order_statistics, summarize


def test_statistics_of_a_known_series() -> None:
    shuffled = np.random.default_rng(0).permutation(np.arange(1, 101))
    one_to_hundred = summarize(shuffled)
    assert one_to_hundred.n == 100
    assert one_to_hundred.median == one_to_hundred.mean == 50.5
    assert one_to_hundred.p90 == pytest.approx(90.1)
    assert one_to_hundred.p99 == pytest.approx(99.01)
    assert one_to_hundred.iqr == pytest.approx(49.5)
    assert one_to_hundred.range == (1, 100)
    low, high = one_to_hundred.spread
    assert low <= 40 < 61 <= high  # binomial ranks 40 and 61, perhaps widened by the batches
    assert 30 < low < high < 71
    assert summarize(101 - shuffled).ci95 == pytest.approx((101 - high, 101 - low))
    assert summarize([2.0, 2.0, 2.0]).iqr == 0
    assert summarize([1.0, 1.0, 1.0, 1.0, 1000.0]).median == 1.0


@pytest.mark.parametrize("n", range(1, 60))
def test_the_ranks_have_the_coverage_that_they_state(n: int) -> None:
    """Every median of n independent values is between them unless k - 1 or fewer lie on one side: counted exactly."""
    k, coverage = order_statistics(n)
    below = [math.comb(n, j) for j in range(n + 1)]
    assert coverage == pytest.approx(1 - 2 * sum(below[:k]) / 2**n, abs=1e-12)
    assert coverage >= LEVEL or k == 1
    assert 2 * k > n - 1 or 1 - 2 * sum(below[: k + 1]) / 2**n < LEVEL  # the next rank would be too narrow


def test_few_repeats_have_a_range_and_no_interval() -> None:
    for values in ([3.0], [3.0, 5.0], [5.0, 4.0, 3.0]):
        found = summarize(values)
        assert (found.ci95, found.coverage, found.spread_name) == (None, None, "range")
        assert found.spread == found.range == (3.0, max(values))
    four, five, six = (summarize([float(k) for k in range(1, n + 1)]) for n in (4, 5, 6))
    assert (four.spread_name, five.spread_name, six.spread_name) == ("88 %", "94 %", "95 %")
    assert five.ci95 == (1.0, 5.0)


def test_the_interval_of_a_duration_is_positive_and_has_its_median() -> None:
    """Once seen: solver steps of about 14 ms, the first of them slow, with an interval of -579 to 607 ms."""
    random = np.random.default_rng(4)
    slow_first = [700.0, 13.9, 13.8, 14.0, 13.9, 650.0, 13.7, 13.9]
    for values in [slow_first, *(random.lognormal(sigma=2.0, size=n) for n in (4, 5, 8, 13, 40) for _ in range(20))]:
        found = summarize(values)
        assert 0 < min(values) <= found.spread[0] <= found.median <= found.spread[1] <= max(values)


def test_the_interval_covers_the_median_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    for n in (4, 5, 30):
        found = [summarize(row) for row in random.exponential(size=(400, n))]
        inside = sum(low <= np.log(2) <= high for low, high in (each.spread for each in found)) / 400
        assert inside >= (found[0].coverage or 1) - 0.05
        assert inside <= min(1.0, (found[0].coverage or 1) + 0.05)


def test_so_it_does_where_neighbours_are_alike() -> None:
    """A first-order autoregression of 0.6, like repeats on a busy machine; taken as independent, they cover 0.7."""
    noise, inside = np.random.default_rng(2).standard_normal(size=(200, 80)), 0
    for row in noise:
        for k in range(1, 80):
            row[k] += 0.6 * row[k - 1]
        low, high = summarize(row[40:]).spread
        inside += low <= 0 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_what_drifts_while_it_is_measured_is_in_the_interval() -> None:
    """The same values from one machine: in the order they came, and sorted as if it became slower all the time."""
    values = np.random.default_rng(3).uniform(10, 14, size=40)
    steady, drifting = summarize(values).spread, summarize(np.sort(values)).spread
    assert drifting[1] - drifting[0] > 2 * (steady[1] - steady[0])


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        summarize([])
