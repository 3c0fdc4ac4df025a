"""What the machine cannot finish in time is refused, once its speed is known, and not by a guess."""

import math
import time
from functools import partial

import msgspec
import pytest

from harness.messages import GenerationRequest
from harness.serving import speed
from harness.serving.policy import evaluation_work
from harness.serving.speed import Capacity, SpeedEstimate

REQUEST = GenerationRequest("a", ["rocket"], 10, 3.0, 64, 64)
SIZE = evaluation_work(REQUEST)


def capacity(seconds: float, forwards: int = 10, **options: object) -> Capacity:
    """Return the capacity of a machine whose evaluations of one image take this long."""
    found = Capacity(lambda request: request.steps, **options)  # type: ignore[arg-type]
    for _ in range(forwards):
        found.speed.observe(SIZE, 4 * SIZE, 4 * seconds)
    return found


def test_what_takes_longer_than_its_timeout_is_refused_in_one_line() -> None:
    found = capacity(0.5)
    found.check(REQUEST, 5.1)
    with pytest.raises(ValueError, match=r"^needs about 5 s here, its timeout is 4.9 s; lower steps, size or n$"):
        found.check(REQUEST, 4.9)
    found.check(REQUEST, math.inf)


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({"steps": 20}, 10.0),
        ({"previews": 4}, 7.0),
        ({"samples_per_prompt": 3}, 15.0),
        ({"guidance": 1.0}, 2.5),
        ({"height": 128, "width": 128}, 20.0),
    ],
)
def test_the_time_grows_with_the_work(changes: dict[str, object], seconds: float) -> None:
    found, requested = capacity(0.5), msgspec.structs.replace(REQUEST, **changes)
    found.check(requested, 1.01 * seconds)
    with pytest.raises(ValueError, match="needs about"):
        found.check(requested, 0.99 * seconds)


def test_replicas_generate_the_images_of_a_request_at_the_same_time() -> None:
    requested = msgspec.structs.replace(REQUEST, samples_per_prompt=3)
    capacity(0.5, replicas=2).check(requested, 10.1)
    with pytest.raises(ValueError, match="needs about 10 s"):
        capacity(0.5, replicas=2).check(requested, 9.9)


def test_nothing_is_refused_while_nothing_is_known() -> None:
    Capacity(lambda request: request.steps).check(REQUEST, 0.001)
    capacity(100.0, forwards=speed.CERTAIN - 1).check(REQUEST, 0.001)  # a first forward may compile


def test_one_slow_forward_refuses_nothing() -> None:
    found = capacity(0.01)
    found.speed.observe(SIZE, SIZE, 1000.0)
    found.check(REQUEST, 1.0)


def test_what_was_learned_long_ago_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may have been busy then, and a size that is refused is never measured again."""
    found, now = capacity(100.0), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + speed.FORGET_S + 1)
    found.check(REQUEST, 1.0)


def test_an_image_for_which_all_others_would_wait_is_refused_if_the_server_says_so() -> None:
    capacity(0.5, max_evaluation_s=0.6).check(REQUEST, math.inf)
    with pytest.raises(ValueError, match=r"about 0.5 s here, this server's limit is serve.max_evaluation_s=0.4"):
        capacity(0.5, max_evaluation_s=0.4).check(REQUEST, math.inf)


def test_images_near_the_default_size_are_taken_on_a_slow_machine() -> None:
    slow = partial(capacity, 100.0, max_evaluation_s=0.5)
    slow(default_work=SIZE / speed.ALWAYS_TAKEN).check(REQUEST, math.inf)
    with pytest.raises(ValueError, match="max_evaluation_s"):
        slow(default_work=0.9 * SIZE / speed.ALWAYS_TAKEN).check(REQUEST, math.inf)


def test_the_number_of_sizes_is_bounded() -> None:
    found = SpeedEstimate()
    for size in range(1, 10 * speed.MOST_SIZES):
        found.observe(float(size), float(size), 1.0)
    assert len(found._sizes) == speed.MOST_SIZES
