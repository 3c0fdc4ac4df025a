"""Which waiting request is next: turns between clients, and the policy within a client."""

import math
import random

import msgspec
import pytest

from harness.config.serve import POLICIES
from harness.messages import GenerationRequest
from harness.serving.policy import (
    AGEING_S,
    TrackedRequest,
    estimated_work,
    next_request,
    serving_order,
    sort_key,
)
from harness.serving.turns import Turns

REQUEST = GenerationRequest("a", ["rocket"], 10, 3.0, 64, 64)


def accepted(
    name: str, arrived: float, deadline: float = math.inf, steps: int = 10, client: str = "", socket: bytes = b"client"
) -> TrackedRequest:
    request = msgspec.structs.replace(REQUEST, request_id=name, steps=steps, client=client)
    return TrackedRequest(socket, request, arrived, deadline)


def names(waiting: list[TrackedRequest], policy: str = "fifo") -> list[str]:
    return [tracked.request.request_id for tracked in serving_order(waiting, Turns(), sort_key(policy))]


WAITING = [accepted("first", 1.0, 90.0, 20), accepted("urgent", 2.0, 5.0, 30), accepted("short", 3.0, 80.0, 2)]


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("fifo", ["first", "urgent", "short"]),
        ("shortest", ["short", "first", "urgent"]),
        ("deadline", ["urgent", "short", "first"]),
    ],
)
def test_the_order_of_a_policy(policy: str, order: list[str]) -> None:
    assert names(WAITING, policy) == order


def test_equals_keep_the_order_in_which_they_came() -> None:
    twins = [accepted("one", 1.0, 9.0, 5), accepted("two", 2.0, 9.0, 5)]
    for policy in POLICIES:
        assert names(twins, policy) == ["one", "two"]


def test_a_long_request_is_passed_by_what_comes_soon_after_it_only() -> None:
    """The bound of `shortest`: AGEING_S for each default request's work."""
    default = estimated_work(REQUEST)
    key = sort_key("shortest", default)
    long = accepted("long", 100.0, steps=40)
    bound_s = AGEING_S * estimated_work(long.request) / default
    assert bound_s == 4 * AGEING_S
    assert key(accepted("soon", 100.0 + 0.8 * bound_s, steps=1)) < key(long)
    assert key(accepted("late", 100.0 + bound_s, steps=1)) > key(long)


@pytest.mark.parametrize("policy", POLICIES.names())
def test_clients_take_turns_whatever_they_claim(policy: str) -> None:
    """A client with many urgent, short requests that came first does not keep another one from its share."""
    greedy = [accepted(f"greedy {k}", 1.0, deadline=2.0, steps=1, client="greedy") for k in range(50)]
    modest = [accepted(f"modest {k}", 5.0, deadline=500.0, steps=5, client="modest") for k in range(4)]
    order = names([*greedy, *modest], policy)
    # each modest request has the work of five greedy ones
    assert [order.index(f"modest {k}") for k in range(4)] == pytest.approx([1, 7, 13, 19], abs=1)


def test_a_request_without_a_client_counts_for_its_socket() -> None:
    turns = [accepted("a", 1.0, socket=b"\x01"), accepted("b", 1.0, socket=b"\x02"), accepted("c", 1.0, client="key:c")]
    assert len({tracked.turn for tracked in turns}) == 3
    assert accepted("a", 1.0, client="key:c").turn == turns[2].turn


def test_the_order_is_that_of_taking_one_after_another() -> None:
    """The heap of `serving_order` against the rule itself."""
    random_ = random.Random(0)
    for policy in POLICIES:
        waiting = [
            accepted(f"{k}", random_.random(), random_.random(), random_.randint(1, 50), f"c{random_.randint(0, 3)}")
            for k in range(60)
        ]
        turns: Turns[str] = Turns()
        turns.charge("c1", 3e6)
        key, left, expected = sort_key(policy), list(waiting), []
        found = serving_order(waiting, turns, key)
        while (tracked := next_request(left, turns, key)) is not None:
            left.remove(tracked)
            expected.append(tracked)
            turns.begin(tracked.turn)
            turns.charge(tracked.turn, estimated_work(tracked.request))
        assert found == expected


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"steps": 20}, 2),
        ({"guidance": 1.0}, 0.5),
        ({"height": 128}, 2),
        ({"prompts": ["a", "b", "c"]}, 3),
        ({"samples_per_prompt": 4}, 4),
        ({"frames": 5}, 5),
    ],
)
def test_work_grows_with_what_is_computed(changes: dict[str, object], factor: float) -> None:
    assert estimated_work(msgspec.structs.replace(REQUEST, **changes)) == factor * estimated_work(REQUEST)
