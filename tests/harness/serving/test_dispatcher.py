"""Images as parts of their own, replicas that do not wait for one another, and forwards that clients share by work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import zmq
from torch import Tensor

from harness.config.serve import POLICIES
from harness.messages import QUEUED, Array, Failure, GenerationResult, Progress, array, decode, encode
from harness.serving.replica import SIDE_S
from harness.serving.transport import Connection, dealer
from tests.fixtures.commands import wait_for
from tests.fixtures.serving.toy_replicas import ToyEngine, toy_answers, toy_engine, toy_progress, toy_request

LARGE = {"height": 64, "width": 64}  # 16 default images, more than a forward of several may have


def held(engine: ToyEngine, replica: int = 0) -> threading.Event:
    """Let the forwards of a replica wait for an event, from the second one on."""
    event, network = threading.Event(), engine.networks[replica]

    def wait(latent: Tensor) -> None:
        if len(network.forwards) > 1:
            assert event.wait(30)

    network.on_forward = wait
    return event


def slow(seconds: float) -> Callable[[Tensor], None]:
    return lambda latent: time.sleep(seconds)


def images(connection: Connection, count: int) -> dict[str, list[Array]]:
    found: dict[str, list[Array]] = {}
    while len(found) < count:
        message, frames = connection.receive()
        assert not isinstance(message, Failure), message
        if isinstance(message, GenerationResult):
            assert [sample.index for sample in message.samples] == list(range(len(message.samples)))
            found[message.request_id] = [array(sample.pixels, frames) for sample in message.samples]
    return found


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_images_of_a_request_are_those_made_alone(replicas: int) -> None:
    with toy_engine(replicas) as engine, engine.connected() as connection:
        connection.send(toy_request("all", prompts=["red", "blue"], samples_per_prompt=3, seed=7))
        for k in range(6):
            connection.send(toy_request(f"{k}", prompts=["red" if k < 3 else "blue"], seed=7 + k))
        found = images(connection, 7)
    assert len(found["all"]) == 6
    for k, image in enumerate(found["all"]):
        np.testing.assert_allclose(image, found[f"{k}"][0], rtol=0, atol=1e-6)
    assert not np.allclose(found["all"][0], found["all"][1], atol=1e-2)


def test_the_prompt_of_many_images_is_encoded_once() -> None:
    with toy_engine() as engine, engine.connected() as connection:
        connection.send(toy_request("all", images=8))
        toy_answers(connection, 1)
        assert sorted(engine.encoders[0].prompts) == ["", "red"]


def test_the_images_of_a_request_share_all_forwards_they_fit_into() -> None:
    with toy_engine(max_batch=4) as engine, engine.connected() as connection:
        connection.send(toy_request("all", images=4, steps=6))
        toy_answers(connection, 1)
        assert [rows for rows, _ in engine.networks[0].forwards] == [8] * 6


def test_a_forward_has_the_work_of_max_batch_default_images() -> None:
    with toy_engine(max_batch=4) as engine, engine.connected() as connection:
        connection.send(toy_request("unguided", images=16, steps=2, guidance=1.0))
        toy_answers(connection, 1)
        assert max(rows for rows, _ in engine.networks[0].forwards) == 8
        engine.networks[0].forwards.clear()
        connection.send(toy_request("tall", images=4, steps=2, height=32))
        toy_answers(connection, 1)
        assert max(rows for rows, _ in engine.networks[0].forwards) == 4


def test_an_image_larger_than_a_forward_is_computed_branch_by_branch_and_stays_the_same() -> None:
    with toy_engine(max_batch=32) as engine, engine.connected() as connection:
        connection.send(toy_request("whole", steps=3, **LARGE))
        whole = images(connection, 1)["whole"]
        assert [rows for rows, _ in engine.networks[0].forwards] == [2] * 3
    with toy_engine(max_batch=2) as engine, engine.connected() as connection:
        connection.send(toy_request("divided", steps=3, **LARGE))
        divided = images(connection, 1)["divided"]
        assert [rows for rows, _ in engine.networks[0].forwards] == [1] * 6
    np.testing.assert_allclose(whole[0], divided[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [{}, LARGE], ids=["default", "large"])
@pytest.mark.parametrize("one_client", [True, False])
def test_a_small_request_does_not_wait_for_one_of_many_images(one_client: bool, size: dict[str, int]) -> None:
    """The forwards are all taken by one request when the small one arrives; its large images wait for one another."""
    with toy_engine(max_batch=8) as engine, engine.connected() as first, engine.connected() as second:
        small = first if one_client else second
        event = held(engine)
        first.send(toy_request("many", images=8, steps=200, **size))
        wait_for(lambda: len(engine.networks[0].forwards) > 1, "the large request to run")
        small.send(toy_request("small", steps=4, height=8, width=8))
        assert toy_progress(small, "small").stage == QUEUED
        event.set()
        assert "small" in toy_answers(small, 1)
        done = [tokens for _, tokens in engine.networks[0].forwards]
        own = [k for k, tokens in enumerate(done) if tokens == min(done)]
        assert own[-1] - own[0] < 2 * 4 + 10, "forwards from its first one to its last"
        first.cancel("many")
        toy_answers(first, 1)


def test_a_client_with_large_requests_without_pause_leaves_half_of_the_work_to_another() -> None:
    with toy_engine(max_batch=8) as engine, engine.connected() as greedy, engine.connected() as modest:
        engine.networks[0].on_forward = slow(0.005)  # long beside the time that a message travels
        for k in range(6):
            greedy.send(toy_request(f"greedy {k}", images=8, steps=500, **LARGE))
        wait_for(lambda: len(engine.networks[0].forwards) > 5, "the large requests to run")
        for k in range(5):
            before = len(engine.networks[0].forwards)
            modest.send(toy_request(f"modest {k}", steps=16))
            assert list(toy_answers(modest, 1)) == [f"modest {k}"]
            forwards = engine.networks[0].forwards[before:]
            large = sum(rows * pixels for rows, pixels in forwards if pixels > 64)
            own = sum(rows * pixels for rows, pixels in forwards if pixels == 64)
            # a unit of each: one branch of a large image before, one after, and some while messages travel
            assert large <= own + 6 * 1024
        for k in range(6):
            greedy.cancel(f"greedy {k}")
        toy_answers(greedy, 6)


def test_replicas_do_not_wait_for_one_another() -> None:
    with toy_engine(2) as engine, engine.connected() as connection:
        events = [held(engine, replica) for replica in range(2)]
        connection.send(toy_request("large", steps=5, **LARGE))
        wait_for(lambda: any(len(network.forwards) > 1 for network in engine.networks), "the large image to run")
        busy = 0 if engine.networks[0].forwards else 1
        events[1 - busy].set()
        for k in range(8):
            connection.send(toy_request(f"small {k}", steps=3))
        assert sorted(toy_answers(connection, 8)) == [f"small {k}" for k in range(8)]
        assert len(engine.networks[busy].forwards) == 2
        events[busy].set()
        assert list(toy_answers(connection, 1)) == ["large"]


def test_the_images_of_a_request_run_on_all_replicas() -> None:
    with toy_engine(2) as engine, engine.connected() as connection:
        connection.send(toy_request("all", images=4, steps=3))
        (answer,) = toy_answers(connection, 1).values()
        assert isinstance(answer, GenerationResult)
        assert [report.rank for report in answer.ranks] == [0, 1]
        assert [report.network_evaluations["denoiser"] for report in answer.ranks] == [6, 6]
        info = connection.ping(5.0)
        assert info is not None
        assert (info.served, info.running, info.rows) == (1, 0, 2 * 4 * 3)
        assert info.evaluations == sum(len(network.forwards) for network in engine.networks)


def test_decoding_many_images_lets_others_have_forwards_between() -> None:
    forwards: list[int] = []
    with toy_engine(max_batch=8) as engine, engine.connected() as connection:

        def on_decode(latent: Tensor) -> None:
            forwards.append(len(engine.networks[0].forwards))
            time.sleep(SIDE_S)

        engine.decoders[0].on_decode = on_decode
        connection.send(toy_request("learns", images=1, steps=1))
        toy_answers(connection, 1)
        forwards.clear()
        connection.send(toy_request("many", images=7, steps=2))
        connection.send(toy_request("beside", steps=30))
        assert list(toy_answers(connection, 2)) == ["many", "beside"]
    assert len(forwards) == 8
    assert len(set(forwards)) == 8, "two images were decoded without a forward between them"


def test_progress_counts_the_steps_of_all_images() -> None:
    seen: list[Progress] = []
    with toy_engine(max_batch=2) as engine, engine.connected() as connection:
        engine.networks[0].on_forward = slow(0.06)
        connection.send(toy_request("all", images=3, steps=5))
        while not isinstance(message := connection.receive()[0], GenerationResult):
            assert isinstance(message, Progress)
            seen.append(message)
    assert (seen[0].stage, seen[0].done) == (QUEUED, 0)
    assert seen[1].stage == "input_validation"  # before the first forward, so that whoever ends the ranks is known
    steps = [message.done for message in seen if message.total and message.stage == "denoising"]
    assert {(message.stage, message.total) for message in seen if message.total} <= {("denoising", 15), ("decoding", 3)}
    assert len(steps) > 3
    assert steps == sorted(steps)
    stages = [message.stage for message in seen if not message.total]
    assert len(stages) == len(set(stages))
    assert stages[-1] == "decoding"


def test_an_image_that_fails_ends_its_request_alone() -> None:
    def fail(latent: Tensor) -> None:
        raise NotImplementedError("planted fault")

    with toy_engine(max_batch=2) as engine, engine.connected() as connection:
        engine.decoders[0].on_decode = fail
        connection.send(toy_request("bad", images=5, steps=2))
        answer = toy_answers(connection, 1)["bad"]
        assert isinstance(answer, Failure)
        assert (answer.kind, answer.message) == ("unsupported", "planted fault")
        assert sum(rows for rows, _ in engine.networks[0].forwards) < 2 * 2 * 5
        engine.decoders[0].on_decode = lambda latent: None
        connection.send(toy_request("good", images=3))
        assert isinstance(toy_answers(connection, 1)["good"], GenerationResult)


def test_an_image_that_is_not_finite_is_refused_before_it_is_decoded() -> None:
    decoded: list[Tensor] = []
    with toy_engine(max_batch=2) as engine, engine.connected() as connection:
        engine.decoders[0].on_decode = decoded.append
        engine.networks[0].on_forward = lambda latent: latent.fill_(float("nan"))
        connection.send(toy_request("nan"))
        answer = toy_answers(connection, 1)["nan"]
    assert isinstance(answer, Failure)
    assert "not finite" in answer.message
    assert not decoded


def test_a_cancelled_request_stops_all_its_images() -> None:
    with toy_engine(2, max_batch=2) as engine, engine.connected() as connection:
        connection.send(toy_request("many", images=8, steps=3000))
        wait_for(lambda: all(network.forwards for network in engine.networks), "both replicas to run")
        connection.cancel("many")
        answer = toy_answers(connection, 1)["many"]
        assert isinstance(answer, Failure)
        assert answer.kind == "cancelled"
        before = [len(network.forwards) for network in engine.networks]
        time.sleep(0.1)
        assert [len(network.forwards) for network in engine.networks] == before
        connection.send(toy_request("next"))
        assert isinstance(toy_answers(connection, 1)["next"], GenerationResult)


def test_a_deadline_ends_what_runs_what_decodes_and_what_waits() -> None:
    with toy_engine(max_batch=1, timeout_s=0.3) as engine, engine.connected() as connection:
        connection.send(toy_request("runs", steps=9000))
        connection.send(toy_request("waits", steps=9000))
        connection.send(toy_request("waits, too", steps=9000))
        found = toy_answers(connection, 3)
    assert {answer.kind for answer in found.values() if isinstance(answer, Failure)} == {"expired"}
    assert len(found) == 3


def test_the_shortest_waiting_request_of_a_client_is_next() -> None:
    with toy_engine(max_batch=1, policy="shortest") as engine, engine.connected() as connection:
        event = held(engine)
        connection.send(toy_request("first", steps=5))
        wait_for(lambda: len(engine.networks[0].forwards) > 1, "the first to run")
        connection.send(toy_request("beside", steps=5))
        assert toy_progress(connection, "beside").stage == QUEUED
        for name, steps in (("longer", 40), ("long", 30), ("short", 20)):
            connection.send(toy_request(name, steps=steps))
            assert toy_progress(connection, name).stage == QUEUED
        event.set()
        order = list(toy_answers(connection, 5))
    assert order[2:] == ["short", "long", "longer"]


@pytest.mark.parametrize("policy", POLICIES.names())
def test_what_has_begun_is_not_passed_for_ever_by_what_comes_later(policy: str) -> None:
    with toy_engine(max_batch=1, policy=policy) as engine, engine.connected() as connection:
        event = held(engine)
        connection.send(toy_request("begun", images=4, steps=20, timeout_s=1000.0))
        wait_for(lambda: len(engine.networks[0].forwards) > 1, "the first image to run")
        for k in range(8):
            connection.send(toy_request(f"later {k}", steps=20, timeout_s=100.0))
            assert toy_progress(connection, f"later {k}").stage == QUEUED
        event.set()
        order = list(toy_answers(connection, 9))
    assert order.index("begun") <= 4


def test_what_cannot_be_finished_in_time_is_refused_at_once() -> None:
    with toy_engine() as engine, engine.connected() as connection:
        engine.networks[0].on_forward = slow(0.02)
        connection.send(toy_request("known", steps=10))
        toy_answers(connection, 1)
        before = len(engine.networks[0].forwards)
        connection.send(toy_request("too much", images=4, steps=2000, timeout_s=10.0))
        answer = toy_answers(connection, 1)["too much"]
        assert isinstance(answer, Failure)
        assert answer.kind == "rejected"
        assert answer.message.startswith("needs about ")
        assert answer.message.endswith(" s here, its timeout is 10 s; lower steps, size or n")
        assert len(engine.networks[0].forwards) == before


def test_a_fault_of_the_dispatcher_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ValueError("planted fault")

    monkeypatch.setattr("harness.serving.dispatcher.Dispatcher._assign_parts", fail)
    monkeypatch.setattr("harness.serving.replica.WATCH_MS", 10)
    with toy_engine(may_fail=True) as engine:
        wait_for(lambda: bool(engine.errors), "the engine to end", 10)
    assert str(engine.errors[0]) == "the dispatcher failed: planted fault"


def test_a_replica_that_fails_leaves_what_waits_to_the_next_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is answered by ranks that end is lost to whoever starts them again."""
    queued = threading.Event()

    def fail(*args: object) -> None:
        queued.wait(10)
        raise ValueError("planted fault")

    monkeypatch.setattr("harness.serving.rank_batch.RankBatch.tick", fail)
    found = []
    with toy_engine(max_batch=1, may_fail=True) as engine, zmq_client(engine) as raw:
        for name in ("runs", "runs beside", "waits"):
            raw.send_multipart(encode(toy_request(name)))
            assert raw.poll(10_000)
            found.append(decode(raw.recv_multipart()))
        queued.set()
        wait_for(lambda: bool(engine.errors), "the engine to end", 10)
        while raw.poll(500):
            found.append(decode(raw.recv_multipart()))
    assert [message.stage for message in found if isinstance(message, Progress)] == [QUEUED] * 3
    assert len(found) == 3, found


@contextmanager
def zmq_client(engine: ToyEngine) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield dealer(context, engine.addresses.requests)
    context.destroy(linger=0)
