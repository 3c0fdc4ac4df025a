"""Which waiting request is next, by policy."""

import msgspec
import pytest

from harness.config.serve import Policy
from harness.messages import GenerationRequest
from harness.serving.policy import TrackedRequest, estimated_work, sort_key

REQUEST = GenerationRequest("a", ["rocket"], 10, 3.0, 64, 64)


def accepted(name: str, arrived: float, deadline: float, steps: int) -> TrackedRequest:
    return TrackedRequest(b"client", msgspec.structs.replace(REQUEST, request_id=name, steps=steps), arrived, deadline)


WAITING = [accepted("first", 1.0, 90.0, 20), accepted("urgent", 2.0, 5.0, 30), accepted("short", 3.0, 80.0, 2)]


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        (Policy.fifo, ["first", "urgent", "short"]),
        (Policy.shortest, ["short", "first", "urgent"]),
        (Policy.deadline, ["urgent", "short", "first"]),
    ],
)
def test_the_order_of_a_policy(policy: Policy, order: list[str]) -> None:
    assert [found.request.request_id for found in sorted(WAITING, key=sort_key(policy))] == order


def test_equals_keep_the_order_in_which_they_came() -> None:
    twins = [accepted("one", 1.0, 9.0, 5), accepted("two", 2.0, 9.0, 5)]
    for policy in Policy:
        assert min(twins, key=sort_key(policy)).request.request_id == "one"


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
