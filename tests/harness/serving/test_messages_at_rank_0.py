"""What clients send to rank 0 is bounded: bytes of a frame, frames of a message, cancellations of unknown requests."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from harness.config.bounds import MAX_IMAGES
from harness.messages import (
    Cancel,
    Configure,
    EngineInfo,
    Failure,
    GenerationResult,
    MessageError,
    Ping,
    decode,
    encode,
)
from harness.resolve.limits import MAX_PROMPT_CHARS
from harness.serving import control
from harness.serving.control import ControlThread
from harness.serving.transport import Addresses, dealer, max_request_bytes
from tests.fixtures.commands import wait_for
from tests.fixtures.serving.toy_replicas import ToyEngine, toy_answers, toy_engine, toy_request


@pytest.fixture
def engine() -> Iterator[ToyEngine]:
    with toy_engine() as made:
        yield made


def test_every_legal_request_fits_into_a_frame() -> None:
    longest = "\U0001f680" * MAX_PROMPT_CHARS  # four bytes each
    for images in (1, 8, 64):
        made = toy_request("a" * 1000, prompts=[longest] * images, negative_prompt=longest, client="b" * 1000)
        assert len(encode(made)[0]) < max_request_bytes(images)
    assert max_request_bytes(MAX_IMAGES) < 1 << 28


def test_a_request_that_is_too_large_is_refused_where_it_is_sent(engine: ToyEngine) -> None:
    with engine.connected() as connection:
        connection.ping(5.0)
        with pytest.raises(MessageError, match="shorten the prompts"):
            connection.send(toy_request("large", prompts=["a" * max_request_bytes(8)]))
        connection.send(toy_request("next"))
        assert isinstance(toy_answers(connection, 1)["next"], GenerationResult)


@pytest.mark.parametrize("socket", ["requests", "control"])
def test_a_client_with_a_larger_frame_is_disconnected(engine: ToyEngine, socket: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    raw, monitor = dealer(context, getattr(engine.addresses, socket)), context.socket(zmq.PAIR)
    raw.monitor("inproc://monitor", zmq.EVENT_DISCONNECTED)
    monitor.connect("inproc://monitor")
    raw.send(b"\x91" * (max_request_bytes(8) + 1))
    assert monitor.poll(10_000), "the client is still connected"
    context.destroy(linger=0)


def test_a_message_of_many_frames_is_answered_in_one_line(engine: ToyEngine) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    raw = dealer(context, engine.addresses.requests)
    raw.send_multipart([*encode(toy_request("a")), *[b"x"] * 1000])
    raw.send_multipart(encode(toy_request("b", steps=1)))
    assert raw.poll(10_000)
    answer = decode(raw.recv_multipart())
    assert isinstance(answer, Failure)
    assert "more than 1 frame" in answer.message
    assert raw.poll(10_000), "the next message is not heard"
    context.destroy(linger=0)


def test_the_ranks_of_a_server_keep_their_configuration(engine: ToyEngine) -> None:
    with engine.connected() as connection:
        connection.send(Configure("task: {name: serve}"))
        refused = toy_answers(connection, 1)[""]
        assert isinstance(refused, Failure)
        assert "these ranks run one configuration" in refused.message
        connection.send(toy_request("next"))
        assert isinstance(toy_answers(connection, 1)["next"], GenerationResult)


def test_the_refusal_of_an_id_in_use_says_which_request_goes_on(engine: ToyEngine) -> None:
    engine.networks[0].on_forward = lambda latent: time.sleep(0.01)
    with engine.connected() as first, engine.connected() as second:
        first.send(toy_request("same", steps=60))
        wait_for(lambda: bool(engine.networks[0].forwards), "the first to run")
        second.send(toy_request("same", steps=2))
        refused = toy_answers(second, 1)["same"]
        assert isinstance(refused, Failure)
        assert "the new one is refused and the first goes on" in refused.message
        assert isinstance(toy_answers(first, 1)["same"], GenerationResult)


def test_of_two_clients_with_one_identity_the_first_goes_on(engine: ToyEngine) -> None:
    """ZeroMQ ignores the second: a client with an identity of its own that gets no answer to a message is not heard."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    first, second = (dealer(context, engine.addresses.requests, identity=b"mine") for _ in range(2))
    first.send_multipart(encode(Ping()))
    assert first.poll(10_000), "a client that is heard gets an answer to any message"
    assert isinstance(decode(first.recv_multipart()), Failure)
    second.send_multipart(encode(Ping()))
    first.send_multipart(encode(toy_request("first")))
    assert first.poll(10_000)
    assert not second.poll(200)
    context.destroy(linger=0)


def test_cancellations_of_requests_that_never_come_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses, context = Addresses.private(), zmq.Context()
    thread = ControlThread(context, addresses, EngineInfo("ready", 1, []))
    client = dealer(context, addresses.control)
    for name in ("open", "unknown"):
        client.send_multipart(encode(Cancel(name)))
    wait_for(lambda: thread.is_cancelled("unknown"), "the cancellations to arrive")
    thread.expire(lambda request_id: request_id == "open")
    assert thread.is_cancelled("unknown")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + control.CANCELLED_S + 1)
    thread.expire(lambda request_id: request_id == "open")
    assert not thread.is_cancelled("unknown")
    assert thread.is_cancelled("open")
    thread.close()
    context.destroy(linger=0)
    addresses.remove()


def test_a_request_of_an_older_client_counts_for_its_socket() -> None:
    fields = msgspec.msgpack.decode(encode(toy_request("a"))[0])
    del fields["client"]
    assert decode([msgspec.msgpack.encode(fields)]) == toy_request("a")
