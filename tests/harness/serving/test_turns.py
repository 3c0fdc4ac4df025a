"""Turns by work: equal shares, nothing saved up while idle, and no memory of clients that have gone."""

import itertools

import pytest

from harness.serving.turns import Turns


def serve(turns: Turns[str], wanted: dict[str, float], units: int) -> list[str]:
    """Serve flows that always have a unit of this work waiting, and return whose turn each was."""
    served = []
    for _ in range(units):
        flow = min(wanted, key=turns.start)
        turns.begin(flow)
        turns.charge(flow, wanted[flow])
        served.append(flow)
    return served


@pytest.mark.parametrize("sizes", [*itertools.permutations([1.0, 3.0, 10.0])])
def test_flows_that_wait_differ_by_one_unit_of_each_at_most(sizes: tuple[float, ...]) -> None:
    wanted = dict(zip("abc", sizes, strict=True))
    served, had = serve(Turns(), wanted, 400), dict.fromkeys(wanted, 0.0)
    for flow in served:
        had[flow] += wanted[flow]
        for one, other in itertools.combinations(wanted, 2):
            assert abs(had[one] - had[other]) <= wanted[one] + wanted[other]


def test_a_flow_that_was_idle_has_saved_nothing_up() -> None:
    turns: Turns[str] = Turns()
    serve(turns, {"busy": 5.0}, 100)
    assert serve(turns, {"busy": 5.0, "new": 5.0}, 20).count("busy") >= 9


def test_a_flow_that_had_more_waits_for_the_others() -> None:
    turns: Turns[str] = Turns()
    turns.begin("large")
    turns.charge("large", 100.0)
    assert serve(turns, {"large": 100.0, "small": 1.0}, 100) == ["small"] * 100
    assert serve(turns, {"large": 100.0, "small": 1.0}, 2).count("large") == 1


def test_flows_behind_the_virtual_time_are_forgotten() -> None:
    turns: Turns[str] = Turns()
    for number in range(1000):
        serve(turns, {f"client {number}": 1.0}, 1)
        serve(turns, {"stays": 1.0}, 1)
    assert len(turns._finish) <= 3
    turns.settle()
    assert not turns._finish


def test_a_copy_changes_on_its_own() -> None:
    turns: Turns[str] = Turns()
    turns.charge("a", 5.0)
    turns.copy().charge("b", 3.0)
    serve(turns.copy(), {"a": 1.0, "b": 1.0}, 10)
    assert (turns.start("a"), turns.start("b")) == (5.0, 0.0)
