"""The request scheduler: rank 0 takes requests in, all ranks agree on their order and hand them to their workers."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import msgspec
import zmq

from harness.messages import (
    ArrayRef,
    Failure,
    GenerationRequest,
    GenerationResult,
    Message,
    MessageError,
    Progress,
    RankOutcome,
    SampleResult,
    Shutdown,
    array,
    decode,
    encode,
)
from harness.parallel.collectives import Collectives
from harness.pipeline.state import OnProgress
from harness.serving.control import WAKE, ControlThread
from harness.serving.transport import rejection
from harness.serving.worker import Worker

PROGRESS_S = 0.1  # at most this often, so that a fast step is not spent on telling of it
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accepted:
    """A request and the client that waits for it."""

    client: bytes
    request: GenerationRequest


class CancelBoard(Protocol):
    """Where rank 0 posts that a request is cancelled, and every rank looks between steps."""

    def post(self, request_id: str) -> None: ...

    def is_posted(self, request_id: str) -> bool: ...


class RequestScheduler:
    """One a rank. Rank 0 owns the sockets; the others sleep in a broadcast until it has something for them.

    Args:
        worker: this rank's.
        collectives: to the other ranks.
        board: where cancellations are posted.
    """

    def __init__(self, worker: Worker, collectives: Collectives, board: CancelBoard) -> None:
        self.worker = worker
        self.collectives = collectives
        self.board = board

    def follow(self) -> None:
        """The loop of ranks other than 0, until rank 0 says Shutdown."""
        while True:
            message = decode([self.collectives.broadcast(None)])
            if not isinstance(message, GenerationRequest):
                return
            is_cancelled = partial(self.board.is_posted, message.request_id)
            frames = self.worker.generate(message, lambda stage, done, total: None, is_cancelled)
            self.collectives.gather(frames)

    def lead(
        self, context: zmq.Context[zmq.Socket[bytes]], requests: zmq.Socket[bytes], control: ControlThread
    ) -> None:
        """The loop of rank 0: accept, order, broadcast, run, answer; until a client says Shutdown."""
        wake = context.socket(zmq.PULL)
        wake.bind(WAKE)
        inbox = Inbox(requests, wake, self.worker.pipeline.check)
        served = 0
        control.update("ready", 0, served)
        while (accepted := inbox.next()) is not None:
            control.update("busy", len(inbox.queue), served)
            is_cancelled = partial(control.is_cancelled, accepted.request.request_id)
            frames = self.answer(accepted.request, _reporter(requests, accepted), is_cancelled)
            requests.send_multipart([accepted.client, *frames])
            control.forget(accepted.request.request_id)
            served += 1
            control.update("ready", len(inbox.queue), served)
        control.update("stopping", len(inbox.queue), served)
        for left in inbox.queue:
            failure = Failure(left.request.request_id, "cancelled", "the engine was shut down before this request ran")
            requests.send_multipart([left.client, *encode(failure)])
        self.stop()
        wake.close(linger=0)

    def stop(self) -> None:
        """Tells the other ranks to leave their loop."""
        self.collectives.broadcast(encode(Shutdown())[0])

    def answer(
        self, request: GenerationRequest, on_progress: OnProgress, is_cancelled: Callable[[], bool]
    ) -> list[bytes]:
        """Runs one accepted request on all ranks; the frames of the answer.

        Args:
            request: one that the pipeline has checked.
            on_progress: told of each stage and solver step of this rank.
            is_cancelled: asked between two steps; once it says yes, the other ranks are told.
        """
        self.collectives.broadcast(encode(request)[0])
        posted = False

        def post_cancelled() -> bool:
            nonlocal posted
            if not posted and is_cancelled():
                self.board.post(request.request_id)
                posted = True
            return posted

        start = time.perf_counter()
        outcomes = self.collectives.gather(self.worker.generate(request, on_progress, post_cancelled))
        return merge(request, outcomes, (time.perf_counter() - start) * 1e3)


def merge(request: GenerationRequest, outcomes: list[list[bytes]], duration_ms: float) -> list[bytes]:
    """The ranks' outcomes as one answer: pictures in the request's order, or the first failure."""
    samples: list[tuple[SampleResult, list[bytes]]] = []
    reports = []
    for frames in outcomes:
        outcome = decode(frames)
        if not isinstance(outcome, RankOutcome):
            raise MessageError(f"a rank answered with {type(outcome).__name__}")
        if outcome.failure is not None:
            return encode(outcome.failure)
        if outcome.report is not None:
            reports.append(outcome.report)
        samples += [(sample, frames) for sample in outcome.samples]
    samples.sort(key=lambda pair: pair[0].index)
    parts: list[bytes] = []

    def moved(ref: ArrayRef, frames: list[bytes]) -> ArrayRef:
        array(ref, frames)  # the shape and the bytes agree
        parts.append(frames[ref.frame])
        return msgspec.structs.replace(ref, frame=len(parts))

    renumbered = [
        msgspec.structs.replace(
            sample,
            pixels=moved(sample.pixels, frames),
            latents=None if sample.latents is None else moved(sample.latents, frames),
        )
        for sample, frames in samples
    ]
    return [*encode(GenerationResult(request.request_id, renumbered, reports, duration_ms)), *parts]


class Inbox:
    """What has arrived and waits; bad input is answered at once and never reaches another rank.

    Args:
        requests: the ROUTER of the engine.
        wake: PULL socket on which the control thread says that the engine shall end.
        check: raises ValueError for a request that the pipeline cannot draw.
    """

    def __init__(
        self, requests: zmq.Socket[bytes], wake: zmq.Socket[bytes], check: Callable[[GenerationRequest], None]
    ) -> None:
        self.queue: deque[Accepted] = deque()
        self._requests = requests
        self._wake = wake
        self._check = check
        self._poller = zmq.Poller()
        self._poller.register(requests, zmq.POLLIN)
        self._poller.register(wake, zmq.POLLIN)

    def next(self) -> Accepted | None:
        """The next request, first come first served; None when the engine shall end. Sleeps while there is nothing."""
        while True:
            ready = dict(self._poller.poll(0 if self.queue else None))
            while self._requests.poll(0):
                self._accept(self._requests.recv_multipart())
            if self._wake in ready:
                return None
            if self.queue:
                return self.queue.popleft()

    def _accept(self, frames: list[bytes]) -> None:
        client, *body = frames
        try:
            message: Message = decode(body)
        except MessageError as error:
            log.warning("requests: %s", error)
            self._requests.send_multipart([client, *encode(rejection(error))])
            return
        if not isinstance(message, GenerationRequest):
            failure = Failure("", "rejected", f"{type(message).__name__} is not a request; the control socket takes it")
            self._requests.send_multipart([client, *encode(failure)])
            return
        try:
            self._check(message)
        except ValueError as error:
            self._requests.send_multipart([client, *encode(Failure(message.request_id, "rejected", str(error)))])
            return
        self.queue.append(Accepted(client, message))


def _reporter(requests: zmq.Socket[bytes], accepted: Accepted) -> OnProgress:
    last = 0.0

    def on_progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if 0 < done < total and now - last < PROGRESS_S:
            return
        last = now
        progress = Progress(accepted.request.request_id, stage, done, total)
        requests.send_multipart([accepted.client, *encode(progress)])

    return on_progress
