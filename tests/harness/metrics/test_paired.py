"""Comparisons in alternation find a real difference and nothing else."""

import itertools
import math

import numpy as np
import pytest

from harness.metrics.paired import min_rounds, outer_rank, ratio, walsh_averages


def rounds(seed: int, n: int, factor: float, spread: float) -> tuple[list[float], list[float]]:
    """Return times of A and B with a common drift, B divided by the factor, and a rare disturbance."""
    rng = np.random.default_rng(seed)
    drift = np.exp(np.cumsum(rng.normal(0, 0.02, n)))
    a, b = (100 * drift * np.exp(rng.normal(0, spread, n)) * (1 + (rng.random(n) < 0.05)) for _ in range(2))
    return list(a), list(b / factor)


def test_equal_configurations_differ_no_more_often_than_stated() -> None:
    found = sum(ratio(*rounds(seed, 10, 1.0, 0.02)).differs for seed in range(1000))
    assert found <= 20  # at most 10 of 1000 are expected


def test_five_percent_are_found_and_lie_in_the_interval() -> None:
    several = [ratio(*rounds(seed, 16, 1.05, 0.01)) for seed in range(200)]
    assert sum(one.differs for one in several) > 150  # disturbed by a factor of 2 once in ten rounds
    assert sum(one.interval[0] <= 1.05 <= one.interval[1] for one in several) >= 194
    assert np.median([one.ratio for one in several]) == pytest.approx(1.05, abs=0.005)


def test_what_is_called_detectable_is_detected_four_times_of_five() -> None:
    share = float(np.median([ratio(*rounds(seed, 16, 1.0, 0.02)).detectable for seed in range(200)]))
    found = sum(ratio(*rounds(seed, 16, 1 + share, 0.02)).differs for seed in range(400)) / 400
    assert 0.65 < found < 0.95


@pytest.mark.parametrize("n", [5, 8, 9])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_is_wilcoxons_by_enumeration(n: int, level: float) -> None:
    sums = sorted(sum(subset) for size in range(n + 1) for subset in itertools.combinations(range(1, n + 1), size))
    k = outer_rank(n, level)

    def missed(below: int) -> float:
        return 2 * sum(total < below for total in sums) / 2**n

    assert missed(k) <= 1 - level < missed(k + 1)


def test_the_estimate_is_the_median_of_pairwise_means() -> None:
    d = np.log([1.1, 0.9, 1.3, 1.2, 1.0, 1.05, 0.97, 1.15])
    by_hand = sorted((x + y) / 2 for k, x in enumerate(d) for y in d[k:])
    assert np.allclose(walsh_averages(d), by_hand)
    assert ratio(list(np.exp(d)), [1.0] * 8).ratio == pytest.approx(math.exp(np.median(by_hand)))


def test_too_few_rounds_are_refused() -> None:
    assert min_rounds() == 8
    with pytest.raises(ValueError, match=r"task.repeats=7: an interval at 99 % needs 8 rounds"):
        ratio([1.0] * 7, [1.0] * 7)
    assert not ratio([1.0] * 8, [1.0] * 8).differs
