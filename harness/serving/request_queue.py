"""What has arrived at rank 0 and waits; bad input is answered at once and never reaches another rank."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import zmq

from harness.config.serve import ServeConfig
from harness.messages import (
    QUEUED,
    Failure,
    GenerationRequest,
    Message,
    MessageError,
    Progress,
    decode,
    encode,
)
from harness.resolve.limits import check_served
from harness.serving.policy import Accepted, Key
from harness.serving.transport import rejection, reply

HINT_ANSWERS = 16  # answers over which the time between two is averaged
PROGRESS_S = 0.1  # at most this often, so that a fast step is not spent on telling of it
log = logging.getLogger(__name__)


def served_check(check: Callable[[GenerationRequest], None], serve: ServeConfig) -> Callable[[GenerationRequest], None]:
    """What a pipeline can draw, and a server takes: raises ValueError for anything else."""

    def both(request: GenerationRequest) -> None:
        check_served(request, serve)
        check(request)

    return both


class Cancellations(Protocol):
    """Where clients' cancellations are found."""

    def is_cancelled(self, request_id: str) -> bool:
        """Whether a client has cancelled this request."""

    def forget(self, request_id: str) -> None:
        """Drops what is remembered of an answered request."""


class Inbox:
    """The requests that wait, and the way back to their clients.

    Args:
        requests: the ROUTER of the engine.
        wake: PULL socket on which the control thread says that the engine shall end.
        check: raises ValueError for a request that this engine does not draw.
        cancellations: of requests, wherever they are.
        key: the request with the lowest is next.
        limit: requests that may wait; None = any number.
        timeout_s: of a request that names none.
    """

    def __init__(
        self,
        requests: zmq.Socket[bytes],
        wake: zmq.Socket[bytes],
        check: Callable[[GenerationRequest], None],
        cancellations: Cancellations,
        key: Key = lambda accepted: accepted.arrived,
        limit: int | None = None,
        timeout_s: float = math.inf,
    ) -> None:
        self.queue: list[Accepted] = []
        self.ending = False
        self._requests = requests
        self._wake = wake
        self._check = check
        self._cancellations = cancellations
        self._key = key
        self._limit = limit
        self._timeout_s = timeout_s
        self._gone: set[bytes] = set()
        self._told: dict[str, float] = {}  # when, of every request that is not answered
        self._answers: deque[float] = deque(maxlen=HINT_ANSWERS)
        self._poller = zmq.Poller()
        self._poller.register(requests, zmq.POLLIN)
        self._poller.register(wake, zmq.POLLIN)

    def take_in(self, running: int = 0, wait: bool = False) -> None:
        """Accepts or refuses what has arrived, and answers what waits no longer (cancelled, expired).

        Args:
            running: requests that are being drawn, and are ahead of those that wait.
            wait: sleep until something has arrived.
        """
        ready = dict(self._poller.poll(None if wait and not self.queue else 0))
        while self._requests.poll(0):
            self._accept(self._requests.recv_multipart(), running)
        self.ending |= self._wake in ready
        if not self.queue and not running:
            self._gone.clear()
        for accepted in list(self.queue):
            if (failure := self.stopped(accepted)) is not None:
                self.queue.remove(accepted)
                self.answer(accepted, encode(failure))

    def first(self) -> Accepted | None:
        """The request that is next, still in the queue."""
        return min(self.queue, key=self._key, default=None)

    def next(self) -> Accepted | None:
        """The request that is next, taken from the queue. Sleeps until there is one; None when the engine shall end."""
        while not self.ending:
            self.take_in(wait=True)
            if not self.ending and (accepted := self.first()) is not None:
                self.queue.remove(accepted)
                return accepted
        return None

    def stopped(self, accepted: Accepted) -> Failure | None:
        """Why a request shall not be drawn to its end, where it shall not."""
        request_id = accepted.request.request_id
        if self._cancellations.is_cancelled(request_id):
            return Failure(request_id, "cancelled", "the request was cancelled")
        if accepted.client in self._gone:
            return Failure(request_id, "cancelled", "the client has gone")
        if time.monotonic() >= accepted.deadline:
            waited = accepted.deadline - accepted.arrived
            return Failure(request_id, "expired", f"the request was not drawn within {waited:g} s of its arrival")
        return None

    def reasoned(self, accepted: Accepted, frames: list[bytes]) -> list[bytes]:
        """An answer of the ranks, who know only that they stopped, with the reason why they were told to."""
        answer, why = decode(frames), self.stopped(accepted)
        stopped = isinstance(answer, Failure) and answer.kind == "cancelled"
        return encode(why) if stopped and why is not None else frames

    def answer(self, accepted: Accepted, frames: list[bytes]) -> None:
        """Sends the one answer of a request."""
        del self._told[accepted.request.request_id]
        self._cancellations.forget(accepted.request.request_id)
        self._answers.append(time.monotonic())
        self._send(accepted.client, frames)

    def tell(self, accepted: Accepted, stage: str, done: int, total: int) -> None:
        """Sends progress, not too often."""
        now, request_id = time.monotonic(), accepted.request.request_id
        if 0 < done < total and now - self._told[request_id] < PROGRESS_S:
            return
        self._told[request_id] = now
        self._send(accepted.client, encode(Progress(request_id, stage, done, total)))

    def close(self) -> None:
        """Answers what still waits: the engine ends."""
        for left in self.queue:
            self.answer(left, encode(_shut_down(left)))
        self.queue.clear()

    def _accept(self, frames: list[bytes], running: int) -> None:
        client, *body = frames
        self._gone.discard(client)
        try:
            message: Message = decode(body)
        except MessageError as error:
            log.warning("requests: %s", error)
            self._send(client, encode(rejection(error)))
            return
        if not isinstance(message, GenerationRequest):
            failure = Failure("", "rejected", f"{type(message).__name__} is not a request; the control socket takes it")
            self._send(client, encode(failure))
            return
        if (refusal := self._refusal(message)) is not None:
            self._send(client, encode(refusal))
            return
        now = time.monotonic()
        timeout_s = self._timeout_s if message.timeout_s is None else min(message.timeout_s, self._timeout_s)
        accepted = Accepted(client, message, now, now + timeout_s)
        ahead = running + sum(self._key(other) <= self._key(accepted) for other in self.queue)
        self.queue.append(accepted)
        self._told[message.request_id] = now
        self.tell(accepted, QUEUED, ahead, 0)

    def _refusal(self, request: GenerationRequest) -> Failure | None:
        try:
            self._check(request)
        except ValueError as error:
            return Failure(request.request_id, "rejected", str(error))
        if request.request_id in self._told:
            return Failure(request.request_id, "rejected", "a request of this id is not answered yet; give another id")
        if self._limit is None or len(self.queue) < self._limit:
            return None
        hint = self._hint_s()
        return Failure(
            request.request_id,
            "busy",
            f"{len(self.queue)} requests wait, which is serve.max_queue; try again in {hint:.0f} s",
            retry_after_s=hint,
        )

    def _hint_s(self) -> float:
        """Until there is room: the mean time between two answers lately, at least a second."""
        times = self._answers
        return max(1.0, (times[-1] - times[0]) / (len(times) - 1)) if len(times) > 1 else 1.0

    def _send(self, client: bytes, frames: list[bytes]) -> None:
        """Never waits: the socket keeps any number of messages for a client that does not read, none for one that has
        gone.
        """
        if not reply(self._requests, client, frames):
            self._gone.add(client)


def _shut_down(accepted: Accepted) -> Failure:
    return Failure(accepted.request.request_id, "cancelled", "the engine was shut down before this request ran")
