"""An engine that serves: shared forwards, deadlines, a bounded queue, policies, and clients that go."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest

from harness.client.generator import DiffusionGenerator
from harness.messages import (
    QUEUED,
    Failure,
    Progress,
)
from tests.fixtures.commands import wait_for
from tests.fixtures.serving.batching import (
    FLOOR,
    MIXED,
    answers,
    connected,
    generate,
    info,
    kinds,
    rel_l2,
    request,
    running,
    serving,
)

LONG = 240


@pytest.fixture(scope="module")
def engine() -> Iterator[DiffusionGenerator]:
    with serving("serve.max_batch=4", "serve.max_queue=4", "serve.policy=shortest", "serve.max_images=2") as made:
        yield made


def test_requests_share_forwards_and_their_images_do_not_change(engine: DiffusionGenerator) -> None:
    alone = {name: generate(engine, {name: change})[name] for name, change in MIXED.items()}
    with connected(engine) as connection:
        before = info(connection)
        together = generate(engine, {name: change for name, change in MIXED.items() if name != "e"})
        after = info(connection)
    for name, images in together.items():
        for image, expected in zip(images, alone[name], strict=True):
            assert rel_l2(image, expected) < FLOOR
    evaluations, rows = after.evaluations - before.evaluations, after.rows - before.rows
    assert rows == 2 * 9 + 4 + 4 * 6 + 2 * 3
    assert evaluations < 9 + 4 + 6 + 3


def test_a_request_joins_and_leaves_between_steps(engine: DiffusionGenerator) -> None:
    """A short request that comes later is answered first and shares steps with the long one."""
    with connected(engine) as connection:
        connection.send(request(engine, "long", steps=60, seed=5))
        running(connection)
        before = info(connection)
        connection.send(request(engine, "short", steps=3, seed=1))
        answered = answers(connection, 2)
        after = info(connection)
    assert list(answered) == ["short", "long"]
    assert kinds(answered) == {"short": "ok", "long": "ok"}
    assert after.evaluations - before.evaluations <= 60


def test_a_cancelled_request_stops_computing_within_one_step(engine: DiffusionGenerator) -> None:
    with connected(engine) as connection:
        connection.send(request(engine, "x", steps=LONG))
        running(connection)
        connection.cancel("x")
        assert kinds(answers(connection, 1)) == {"x": "cancelled"}
        stopped = info(connection)
        assert stopped.running == 0
        time.sleep(0.3)
        assert info(connection).evaluations == stopped.evaluations < LONG + 200


@pytest.mark.slow
def test_a_deadline_ends_what_runs_and_what_waits() -> None:
    """On an engine that knows nothing of its speed yet, so that it refuses nothing."""
    with serving("serve.max_batch=4", "serve.policy=shortest", "serve.max_images=2") as made, connected(made) as client:
        client.send(request(made, "slow", steps=LONG, timeout_s=0.5, prompts=["a", "b"]))
        client.send(request(made, "beside", steps=LONG, prompts=["a", "b"], timeout_s=1.0))
        client.send(request(made, "waits", steps=LONG + 1, timeout_s=0.2))
        answered = answers(client, 3)
        assert kinds(answered) == dict.fromkeys(("waits", "slow", "beside"), "expired")
        assert list(answered) == ["waits", "slow", "beside"]
        failure = answered["waits"][0]
        assert isinstance(failure, Failure)
        assert "0.2 s" in failure.message
        client.send(request(made, "impossible", steps=LONG, timeout_s=0.5))
        refused = answers(client, 1)["impossible"][0]
    assert isinstance(refused, Failure)
    assert refused.kind == "rejected"
    assert "here, its timeout is 0.5 s; lower steps, size or n" in refused.message


def test_a_full_queue_says_when_to_come_again_and_the_shortest_is_next(engine: DiffusionGenerator) -> None:
    with connected(engine) as connection:
        for name in ("one", "two"):
            connection.send(request(engine, name, steps=40, prompts=["a", "b"], batch_size=2))
        running(connection, requests=2)  # while the second waits, there is no room in the queue for all that follow
        for name, steps in (("farthest", 35), ("far", 30), ("near", 2), ("middle", 9)):
            connection.send(request(engine, name, steps=steps, prompts=["a", "b"], batch_size=2, guidance=1.0))
        connection.send(request(engine, "late"))
        answered = answers(connection, 7)
    failure = answered["late"][0]
    assert isinstance(failure, Failure)
    assert failure.kind == "busy"
    assert failure.retry_after_s is not None
    assert failure.retry_after_s >= 1
    assert kinds(answered) == dict.fromkeys(answered, "ok") | {"late": "busy"}
    order = [name for name in answered if name not in ("one", "two", "late")]
    assert order == ["near", "middle", "far", "farthest"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 300}, "250 at most"),
        ({"prompts": ["a"] * 3}, "2 per request"),
        ({"timeout_s": -1.0}, "more than 0"),
        ({"timeout_s": math.nan}, "more than 0"),
        ({"count_flops": True}, "max_batch=1"),
        ({"profile": True}, "max_batch=1"),
        ({"height": 63}, "multiple"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_a_server_does_not_take_is_refused(
    engine: DiffusionGenerator, changes: dict[str, object], says: str
) -> None:
    with connected(engine) as connection:
        connection.send(request(engine, "x", **changes))
        answer, _ = answers(connection, 1)["x"]
    assert isinstance(answer, Failure)
    assert answer.kind == "rejected"
    assert says in answer.message


def test_an_id_in_use_is_refused(engine: DiffusionGenerator) -> None:
    with connected(engine) as first, connected(engine) as second:
        first.send(request(engine, "same", steps=LONG))
        running(first)
        second.send(request(engine, "same", steps=2))
        assert kinds(answers(second, 1)) == {"same": "rejected"}
        first.cancel("same")
        assert kinds(answers(first, 1)) == {"same": "cancelled"}


def test_the_requests_of_a_client_that_has_gone_are_dropped(engine: DiffusionGenerator) -> None:
    with connected(engine) as watcher:
        with connected(engine) as goes:
            goes.send(request(engine, "left", steps=LONG))
            running(goes)
            assert info(watcher).running == 1
        wait_for(lambda: info(watcher).running == 0, "the engine to notice", 10)
        assert info(watcher).state == "ready"


@pytest.mark.slow
def test_a_shutdown_finishes_what_runs_and_answers_what_waits() -> None:
    with serving("serve.max_batch=2") as made, connected(made) as connection:
        for name in ("a", "b", "c"):
            connection.send(request(made, name, steps=40))
        running(connection, requests=2)
        connection.shutdown()
        answered = kinds(answers(connection, 3))
    assert answered == {"a": "ok", "b": "ok", "c": "cancelled"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "cfg2", "ulysses2"])
def test_ranks_share_forwards_and_the_images_are_those_of_one_rank(engine: DiffusionGenerator, layout: str) -> None:
    requested = {name: MIXED[name] for name in ("a", "c", "e")}
    expected = {name: generate(engine, {name: change})[name] for name, change in requested.items()}
    with serving(f"parallel={layout}", "serve.max_batch=4") as ranks, connected(ranks) as connection:
        generated = generate(ranks, requested)
        counted = info(connection)
        connection.send(request(ranks, "x", steps=LONG))
        running(connection)
        connection.cancel("x")
        assert kinds(answers(connection, 1)) == {"x": "cancelled"}
    for name, images in generated.items():
        for image, alone in zip(images, expected[name], strict=True):
            assert rel_l2(image, alone) < FLOOR
    branches = 1 if layout == "cfg2" else 2
    assert counted.rows == branches * (9 + 2 * 6 + 12)
    assert counted.evaluations < 9 + 6 + 12


@pytest.mark.slow
def test_one_after_another_honours_deadlines_too() -> None:
    with serving("serve.max_batch=1") as made, connected(made) as connection:
        connection.send(request(made, "slow", steps=LONG, timeout_s=0.5))
        connection.send(request(made, "waits", steps=2))
        answered = answers(connection, 2)
        counted = info(connection)
    assert kinds(answered) == {"slow": "expired", "waits": "ok"}
    assert counted.evaluations == counted.rows // 2 < LONG


def test_the_acceptance_names_the_place_in_the_queue(engine: DiffusionGenerator) -> None:
    large = {"height": 128, "width": 128}  # so that they still run when the third arrives
    with connected(engine) as connection:
        connection.send(request(engine, "first", steps=LONG, prompts=["a", "b"], batch_size=2, **large))
        connection.send(request(engine, "second", steps=LONG, prompts=["a", "b"], batch_size=2, **large))
        running(connection)
        connection.send(request(engine, "third", steps=2))
        while not (isinstance(progress := connection.receive()[0], Progress) and progress.request_id == "third"):
            pass
        for name in ("first", "second", "third"):
            connection.cancel(name)
        answers(connection, 3)
    assert (progress.stage, progress.done) == (QUEUED, 2)
