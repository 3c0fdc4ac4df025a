"""Previews with step batching: side work between forwards, of the first image alone, charged to its client."""

import time

import numpy as np
import pytest
from torch import Tensor

from harness.config.serve import ServeConfig
from harness.messages import DENOISING, GenerationResult, Progress, array
from harness.pipeline.denoise import PREVIEW
from harness.serving.policy import estimated_work
from harness.serving.transport import Connection
from harness.tasks.serve.hangs import FLOOR_S, HangDetector
from harness.tasks.serve.open_requests import OpenRequests
from tests.fixtures.serving.toy_replicas import toy_answers, toy_engine, toy_request


def messages_of(connection: Connection, name: str) -> tuple[list[Progress], GenerationResult, list[np.ndarray]]:
    """Return the progress of a request, its answer and its images."""
    seen: list[Progress] = []
    while True:
        message, frames = connection.receive()
        if isinstance(message, Progress) and message.request_id == name:
            seen.append(message)
        elif isinstance(message, GenerationResult) and message.request_id == name:
            return seen, message, [array(sample.pixels, frames) for sample in message.samples]


@pytest.mark.parametrize("replicas", [1, 2])
def test_every_preview_reaches_the_client_and_the_images_stay_the_same(replicas: int) -> None:
    with toy_engine(replicas) as engine, engine.connected() as connection:
        connection.send(toy_request("plain", images=3, steps=8, seed=3))
        _, plain, expected = messages_of(connection, "plain")
        connection.send(toy_request("shown", images=3, steps=8, seed=3, previews=3))
        seen, answer, images = messages_of(connection, "shown")
    for one, other in zip(images, expected, strict=True):
        assert np.array_equal(one, other)
    previews = [message for message in seen if message.preview]
    assert [message.stage for message in previews] == [DENOISING] * 3
    assert len({message.preview for message in previews}) == 3
    assert all(message.preview.startswith(b"\x89PNG") for message in previews)
    assert [message.done for message in previews] == sorted(message.done for message in previews)
    assert {message.total for message in previews} == {24}
    assert sum(rank.network_evaluations.get(PREVIEW, 0) for rank in answer.ranks) == 3  # of the first image alone
    assert not any(PREVIEW in rank.network_evaluations for rank in plain.ranks)


def test_a_preview_waits_for_its_turn_and_others_have_forwards_meanwhile() -> None:
    decoded: list[int] = []
    with toy_engine(max_batch=4) as engine, engine.connected() as connection:
        network = engine.networks[0]

        def slow_decode(latent: Tensor) -> None:
            time.sleep(0.12)  # more than all side work between two forwards may take
            decoded.append(len(network.forwards))

        engine.decoders[0].on_decode = slow_decode
        for name in ("a", "b", "c"):
            connection.send(toy_request(name, steps=8, previews=2))
        toy_answers(connection, 3)
    assert len(decoded) == 9
    assert len(set(decoded[:6])) > 1, "all previews were decoded without a forward between them"


def test_previews_count_as_work() -> None:
    plain, shown = (toy_request("a", images=2, steps=10, previews=count) for count in (0, 5))
    assert estimated_work(shown) == estimated_work(plain) * 25 / 20


def test_a_step_with_a_preview_may_take_as_long_as_a_decoding() -> None:
    now = [0.0]
    hangs = HangDetector(30.0, 600.0, lambda: now[0])

    def run(name: str, previews: int) -> None:
        hangs.on_sent(toy_request(name, previews=previews))
        for stage, took_s in ((DENOISING, 0.1), (DENOISING, 0.1), ("decoding", 0.1), ("done", 2.0)):
            hangs.on_message(Progress(name, stage, 0, 0))
            now[0] += took_s

    run("first", 0)
    hangs.on_message(Progress("first", "decoding", 0, 0))
    now[0] += 2.0
    hangs.on_message(Progress("first", "saving", 0, 0))
    hangs.on_engine_gone()
    for name, previews in (("plain", 0), ("shown", 1)):
        hangs.on_sent(toy_request(name, previews=previews))
        hangs.on_message(Progress(name, DENOISING, 0, 0))
        now[0] += FLOOR_S + 3.0
        if previews:
            hangs.check()
        else:
            with pytest.raises(Exception, match="made no progress in denoising"):
                hangs.check()
        hangs.on_engine_gone()


def test_ranks_that_die_take_the_previews_with_them() -> None:
    requests = OpenRequests(ServeConfig())
    job = requests.add(toy_request("a", previews=2))
    job.on_progress(Progress("a", DENOISING, 1, 4, b"png"))
    assert job.previews == [b"png"]
    job.queue_again()
    assert job.previews == []
    assert (job.stage_done, job.stage_total) == (0, 0)
