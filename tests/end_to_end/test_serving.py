"""A running engine of two ranks generates, refuses, reports, cancels, sleeps and ends; foreign bytes do not end it."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from harness.client.generator import DiffusionGenerator, Generation
from harness.engines.processes import process_name
from harness.engines.protocol import RequestFailed
from harness.engines.torchrun import TorchrunEngine
from harness.messages import QUEUED, Failure, GenerationRequest, GenerationResult, Ping, Progress, decode, encode
from harness.resolve.request import to_message
from harness.serving.transport import Addresses, Connection, dealer
from tests.fixtures.commands import cpu_seconds, wait_for

LONG = 5000


@pytest.fixture(scope="module")
def generator() -> Iterator[DiffusionGenerator]:
    made = DiffusionGenerator.from_config(
        "parallel=dp2", "launch.threads_per_rank=1", "request.steps=2", "request.prompt=rocket", "logger=json"
    )
    with made:
        yield made


def addresses(generator: DiffusionGenerator) -> Addresses:
    assert isinstance(generator._engine, TorchrunEngine)
    return generator._engine.addresses


@contextmanager
def connected(generator: DiffusionGenerator) -> Iterator[Connection]:
    connection = Connection(addresses(generator), lambda: None)
    try:
        yield connection
    finally:
        connection.close()


def request(generator: DiffusionGenerator, **changes: object) -> GenerationRequest:
    return msgspec.structs.replace(to_message(generator.config.request), **changes)


def answer(connection: Connection) -> GenerationResult | Failure:
    """Return the next answer that is not a progress message."""
    while True:
        message, _ = connection.receive()
        if isinstance(message, GenerationResult | Failure):
            return message


def runs(connection: Connection) -> bool:
    """Return whether the next message reports work."""
    message, _ = connection.receive()
    return isinstance(message, Progress) and message.stage != QUEUED


def same(one: Generation, other: Generation) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one.pixels, other.pixels, strict=True))


def test_the_sockets_are_private_and_the_ranks_are_known(generator: DiffusionGenerator) -> None:
    folder = addresses(generator).folder
    assert folder.stat().st_mode & 0o777 == 0o700
    info = generator.info
    assert info is not None
    assert (info.world_size, info.device, info.attention, info.threads) == (2, "cpu", "torch sdpa", 1)
    assert [process_name(pid) for pid in info.pids] == ["triptych-0", "triptych-1"]


def test_a_seed_gives_one_image_in_every_batch_and_repeat(generator: DiffusionGenerator) -> None:
    first = generator.generate(seed=3)
    assert same(first, generator.generate(seed=3))
    assert not same(first, generator.generate(seed=4))
    several = generator.generate(prompts=["pizza", "rocket", "cat face"], seed=2)
    assert np.array_equal(several.pixels[1], first.pixels[0])
    assert [report.rank for report in several.result.ranks] == [0, 1]
    assert [sample.prompt for sample in several.result.samples] == ["pizza", "rocket", "cat face"]
    assert [report.network_evaluations["denoiser"] for report in several.result.ranks] == [4, 2]
    assert several.record.summary.nfe == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"height": 65}, "64 or 72"),
        ({"steps": 0}, "give 1 to"),
        ({"seed": -1}, "give 0 to"),
        ({"guidance": float("nan")}, "guidance"),
        ({"prompts": ["a"] * 5000}, "5000 images"),
        ({"prompt": "a" * 100_000}, "100000 characters"),
        ({"height": 8192, "width": 8192}, "at most"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_generated_is_refused_and_the_engine_continues(
    generator: DiffusionGenerator, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(RequestFailed, match=says) as caught:
        generator.generate(**changes)  # type: ignore[arg-type]
    assert caught.value.kind == "rejected"
    assert len(generator.generate().pixels) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "changes", "says"),
    [
        ("parallel=cfg2", {"guidance": 1.0}, "parallel.cfg=2 needs guidance"),
        ("parallel=ring2", {"height": 8, "width": 64}, "2 ranks decode a picture of 1 rows of tokens; use 1 ranks"),
    ],
)
def test_a_request_that_the_ranks_cannot_share_is_refused_and_they_serve_on(
    layout: str, changes: dict[str, object], says: str
) -> None:
    with DiffusionGenerator.from_config(layout, "launch.threads_per_rank=1", "request.steps=1") as shared:
        with pytest.raises(RequestFailed, match=says) as caught:
            shared.generate(prompt="rocket", **changes)  # type: ignore[arg-type]
        assert caught.value.kind == "rejected"
        assert len(shared.generate(prompt="rocket").pixels) == 1


def test_progress_streams_to_the_end(generator: DiffusionGenerator) -> None:
    seen: list[Progress] = []
    result = generator.generate(steps=40, on_progress=seen.append).result
    stages = [stage.name for stage in result.ranks[0].stages]
    assert (seen[0].stage, seen[0].done) == (QUEUED, 0)
    order = [stages.index(progress.stage) for progress in seen[1:]]
    assert order == sorted(order)
    steps = [progress.done for progress in seen if progress.stage == "denoising"]
    assert steps == sorted(steps)
    assert len(set(steps)) > 2
    assert steps[-1] == 40
    assert all(progress.total == 40 for progress in seen if progress.done)


def test_a_busy_engine_answers_and_cancels_between_two_steps(generator: DiffusionGenerator) -> None:
    seen: list[Progress] = []
    failures: list[RequestFailed] = []

    def generate() -> None:
        try:
            generator.generate(prompts=["rocket", "pizza"], steps=LONG, on_progress=seen.append)
        except RequestFailed as error:
            failures.append(error)

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    wait_for(lambda: bool(seen) and seen[-1].done > 1, "progress")
    with connected(generator) as connection:
        requested = time.monotonic()
        info = connection.ping(5.0)
        assert time.monotonic() - requested < 1.0
        assert info is not None
        assert info.state == "busy"
        before, requested = seen[-1].done, time.monotonic()
        connection.cancel(seen[-1].request_id)
        thread.join(timeout=30)
        took = time.monotonic() - requested
        wait_for(lambda: (connection.ping() or info).state == "ready", "the engine to be ready", 5)
    assert [failure.kind for failure in failures] == ["cancelled"]
    assert took < 2.0
    assert before <= seen[-1].done < before + 100 < LONG
    assert len(generator.generate().pixels) == 1


def test_clients_are_served_in_turn_and_a_waiting_request_can_be_cancelled(generator: DiffusionGenerator) -> None:
    with connected(generator) as first, connected(generator) as second:
        running, waiting, last = (request(generator, request_id=name, steps=LONG) for name in ("a", "b", "c"))
        first.send(running)
        wait_for(lambda: runs(first), "the first request to run")
        second.send(waiting)
        second.send(msgspec.structs.replace(last, steps=2))
        second.cancel("b")
        time.sleep(0.5)
        first.cancel("a")
        stopped = answer(first)
        assert isinstance(stopped, Failure)
        assert (stopped.request_id, stopped.kind) == ("a", "cancelled")
        dropped = answer(second)
        assert isinstance(dropped, Failure)
        assert (dropped.request_id, dropped.kind) == ("b", "cancelled")
        generated = answer(second)
        assert isinstance(generated, GenerationResult)
        assert generated.request_id == "c"


FOREIGN = [
    [b""],
    [b"\x00" * 100],
    [b"GET / HTTP/1.1\r\n\r\n"],
    [b"\x80\x04\x95pickle"],
    [b"\x85\xa4type\xa7Failu\xf2e\xaarequest_id\xa1a\xa4kind\xa3oom\xa7message\xa1x\xa4rank\x01"],
    [b"\x91" * 200_000],
    [os.urandom(64), os.urandom(64)],
    [b"", b"", b""],
    [*encode(Ping()), b"extra"],
    encode(Failure("a", "oom", "x")),
]


@pytest.mark.parametrize("socket", ["requests", "control"])
def test_foreign_frames_are_answered_or_ignored(generator: DiffusionGenerator, socket: str) -> None:
    expected = generator.generate(seed=9)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    raw = dealer(context, getattr(addresses(generator), socket))
    try:
        for frames in FOREIGN:
            raw.send_multipart(frames)
            if socket == "requests":
                assert raw.poll(10_000), f"{frames!r:.60} was not answered"
                message = decode(raw.recv_multipart())
                assert isinstance(message, Failure)
                assert message.kind == "rejected"
    finally:
        raw.close(linger=1000)
        context.term()
    with connected(generator) as connection:
        wait_for(lambda: connection.ping() is not None, "the control socket to answer", 10)
    assert same(generator.generate(seed=9), expected)


def test_clients_that_do_not_wait_for_a_ping_are_let_go(generator: DiffusionGenerator) -> None:
    for _ in range(20):
        with connected(generator) as hasty:
            for _ in range(20):
                hasty._control.send_multipart(encode(Ping()))
    with connected(generator) as connection:
        wait_for(lambda: connection.ping() is not None, "the control socket to answer", 10)


def test_idle_ranks_sleep(generator: DiffusionGenerator) -> None:
    """A rank that spins would use its whole core."""
    assert generator.info is not None
    generator.generate()
    time.sleep(0.5)
    before = {pid: cpu_seconds(pid) for pid in generator.info.pids}
    time.sleep(3)
    used = {pid: cpu_seconds(pid) - before[pid] for pid in before}
    assert max(used.values()) < 0.1 * 3, used


def test_a_shutdown_finishes_what_runs_answers_what_waits_and_leaves_nothing(generator: DiffusionGenerator) -> None:
    """This is the last test in this file: the engine has ended after it."""
    assert generator.info is not None
    pids, folder = generator.info.pids, addresses(generator).folder
    with connected(generator) as connection:
        connection.send(request(generator, request_id="runs", steps=60))
        wait_for(lambda: runs(connection), "the request to run")
        connection.send(request(generator, request_id="waits"))
        connection.ping()
        connection.shutdown()
        finished, left = answer(connection), answer(connection)
    assert isinstance(finished, GenerationResult)
    assert finished.request_id == "runs"
    assert isinstance(left, Failure)
    assert (left.request_id, left.kind) == ("waits", "cancelled")
    generator.stop()
    generator.stop()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the ranks to end", 10)
    assert not folder.exists()
    with pytest.raises(RuntimeError):
        generator.generate()
