"""The second client of a load takes all that it can get, sends less after a refusal, and leaves nothing behind."""

from __future__ import annotations

import threading
import time

import pytest

from harness.config.schema import RunConfig
from harness.resolve.compose import ConfigError, compose_run
from harness.tasks.load import entry
from harness.tasks.load.background import LargestRequest, send_without_pause
from tests.fixtures.commands import wait_for
from tests.fixtures.serving.toy_replicas import toy_engine


def config_of(*overrides: str) -> RunConfig:
    size = ["request.prompt=red", "request.height=16", "request.width=16"]
    return compose_run(["task=load", "load.background=2", *size, *overrides]).config


def test_it_begins_with_the_largest_request_that_is_allowed() -> None:
    largest = LargestRequest.of(config_of("serve.max_steps=100", "serve.max_images=4"))
    assert (largest.side, largest.images, largest.steps) == (512, 4, 100)


def test_it_sends_less_after_each_refusal_and_always_something_legal() -> None:
    seen = [LargestRequest.of(config_of())]
    while seen[-1].lowered() != seen[-1]:
        seen.append(seen[-1].lowered())
        assert seen[-1].side % 8 == 0
    assert (seen[-1].side, seen[-1].images, seen[-1].steps) == (16, 1, 1)
    assert len(seen) < 25


def test_it_keeps_its_requests_outstanding_and_cancels_them() -> None:
    config, stop, began = config_of("serve.max_steps=20"), threading.Event(), threading.Event()
    found: list[LargestRequest] = []
    with toy_engine() as engine, engine.connected() as connection, engine.connected() as watcher:
        engine.networks[0].on_forward = lambda latent: time.sleep(0.005)
        # the first request, of 16 x 16 pixels, lets the engine know its speed
        engine.capacity._max_evaluation_s = 0.1

        def run() -> None:
            found.append(send_without_pause(config, connection, stop, began))

        thread = threading.Thread(target=run)
        thread.start()
        assert began.wait(10)
        wait_for(lambda: (info := watcher.ping(5.0)) is not None and info.running + info.queued == 2, "two requests")
        time.sleep(0.5)
        info = watcher.ping(5.0)
        assert info is not None
        assert info.running + info.queued == 2
        stop.set()
        thread.join(20)
        assert not thread.is_alive()
        wait_for(lambda: (info := watcher.ping(5.0)) is not None and info.running + info.queued == 0, "the end")
    (largest,) = found
    assert 16 < largest.side < 512


def test_it_needs_a_socket_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"load.background is a second client over ZeroMQ"):
        entry.check(compose_run(["task=load", "load.background=1", "load.transport=http", "request.prompt=red"]))
