"""Previews with step batching: side work between forwards, of the first image alone, charged to its client."""

import math

import numpy as np
import pytest
import torch

from harness.config.serve import ServeConfig
from harness.messages import DENOISING, GenerationResult, Progress, array
from harness.pipeline.denoise import PREVIEW
from harness.pipeline.state import evaluate_directly
from harness.serving.parts import part
from harness.serving.policy import TrackedRequest, estimated_work
from harness.serving.transport import Connection
from harness.tasks.serve.hangs import FLOOR_S, HangDetector
from harness.tasks.serve.open_requests import OpenRequests
from tests.fixtures.serving.toy_replicas import RecordingDecoder, toy_engine, toy_request, toy_worker
from tests.fixtures.toy_pipeline import ToyEncoder, ToyNetwork


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


def test_a_preview_waits_for_its_turn_as_a_decoding_does() -> None:
    decoder, pauses = RecordingDecoder(), list[int]()
    decoded: list[int] = []
    decoder.on_decode = lambda latent: decoded.append(len(latent))
    worker = toy_worker(0, 1, ToyNetwork(), decoder, ToyEncoder())
    one = part(TrackedRequest(b"", toy_request("a", images=2, steps=8, previews=2), 0.0, math.inf), 0)
    with torch.inference_mode():
        fiber = worker.fiber(one, lambda stage, done, total: None, lambda done, total, preview: None, [])
        while not fiber.finished:
            if fiber.paused:
                pauses.append(len(decoded))
            fiber.advance(None if fiber.call is None else evaluate_directly(fiber.call))
    assert pauses == [0, 1, 2]  # before each of two previews, and before the image
    assert len(decoded) == 3


def test_previews_count_as_work() -> None:
    plain, shown = (toy_request("a", images=2, steps=10, previews=count) for count in (0, 5))
    assert estimated_work(shown) == estimated_work(plain) * 25 / 20
    parts = [part(TrackedRequest(b"", shown, 0.0, math.inf), index).request for index in range(2)]
    assert sum(map(estimated_work, parts)) == estimated_work(shown)


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
