"""The queue of requests at rank 0; invalid input is answered at once and never reaches another rank."""

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
    Configure,
    Failure,
    GenerationRequest,
    Message,
    MessageError,
    Progress,
    decode,
    encode,
)
from harness.resolve.limits import check_server_limits
from harness.serving.policy import SortKey, TrackedRequest, estimated_work, next_request, serving_order
from harness.serving.speed import Capacity
from harness.serving.transport import MAX_FRAMES, decode_message, has_message, receive_bounded, rejection, reply
from harness.serving.turns import Turns

RETRY_WINDOW = 16  # the number of latest answers over which the interval is averaged
CHECK_S = 0.01  # the shortest interval between two looks at the waiting requests while others run
PROGRESS_INTERVAL_S = 0.1  # the shortest interval between two messages, so that fast steps are not slowed by reporting
log = logging.getLogger(__name__)


def check_with_limits(
    check: Callable[[GenerationRequest], None], serve: ServeConfig
) -> Callable[[GenerationRequest], None]:
    """Return a check that raises ValueError for what the server does not accept or the pipeline cannot generate.

    Args:
        check: the pipeline's own check.
        serve: the server's limits.

    Returns:
        The combined check.
    """

    def check_both(request: GenerationRequest) -> None:
        check_server_limits(request, serve)
        check(request)

    return check_both


class Cancellations(Protocol):
    """Access to the cancellations that clients have sent."""

    def is_cancelled(self, request_id: str) -> bool:
        """Return whether a client has cancelled this request."""

    def forget(self, request_id: str) -> None:
        """Drop the cancellation of an answered request."""

    def expire(self, is_open: Callable[[str], bool]) -> None:
        """Drop old cancellations of requests that are not open."""


class RequestQueue:
    """The waiting requests, and the answers to their clients.

    Args:
        requests: the engine's ROUTER socket.
        wake: the PULL socket on which the control thread asks the engine to end.
        check: a function that raises ValueError for a request that this engine cannot serve.
        cancellations: the cancellations of waiting and running requests.
        key: the sort key within a client; its request with the lowest key is next.
        limit: the largest number of waiting requests; None for no limit.
        timeout_s: the time limit of a request that names none, s; also the largest one that a request may name.
        capacity: refuses what the machine cannot finish in time; None refuses nothing.
        configure: changes the configuration of all ranks, and returns the frames of the answer; None refuses.

    Attributes:
        queue: the waiting requests, in the order of arrival.
        accepted: the number of requests that were queued so far.
        shutting_down: whether a client has asked the engine to end.
        turns: what each client has had.
        key: the sort key within a client.
        capacity: what refuses requests that take too long.
    """

    def __init__(
        self,
        requests: zmq.Socket[bytes],
        wake: zmq.Socket[bytes],
        check: Callable[[GenerationRequest], None],
        cancellations: Cancellations,
        key: SortKey = lambda tracked: tracked.arrived,
        limit: int | None = None,
        timeout_s: float = math.inf,
        capacity: Capacity | None = None,
        configure: Callable[[Configure], list[bytes]] | None = None,
    ) -> None:
        self.queue: list[TrackedRequest] = []
        self.accepted = 0
        self.shutting_down = False
        self.turns: Turns[str] = Turns()
        self.key = key
        self.capacity = Capacity(lambda request: request.steps) if capacity is None else capacity
        self._requests = requests
        self._wake = wake
        self._check = check
        self._cancellations = cancellations
        self._limit = limit
        self._timeout_s = timeout_s
        self._configure = configure
        self._disconnected: set[bytes] = set()
        self._progress_sent: dict[str, float] = {}  # the time of the last message, for every open request
        self._answers: deque[float] = deque(maxlen=RETRY_WINDOW)
        self._checked = 0.0
        self._poller = zmq.Poller()
        self._poller.register(requests, zmq.POLLIN)
        self._poller.register(wake, zmq.POLLIN)

    def watch(self, socket: zmq.Socket[bytes]) -> None:
        """Let `poll` return when something arrives on another socket, too."""
        self._poller.register(socket, zmq.POLLIN)

    def poll(self, running: int = 0, wait_ms: int | None = 0) -> None:
        """Accept or refuse what has arrived, and answer waiting requests that were cancelled or have expired.

        Args:
            running: the number of running requests, which come before the waiting ones.
            wait_ms: the longest time to sleep until something arrives, ms; None for no limit.
        """
        ready = dict(self._poller.poll(wait_ms))
        while has_message(self._requests):
            self._accept(receive_bounded(self._requests, MAX_FRAMES), running)
        self.shutting_down |= self._wake in ready
        if not self.queue and not running:
            self._disconnected.clear()
            self.turns.settle()
        self._cancellations.expire(lambda request_id: request_id in self._progress_sent)
        if running and time.monotonic() - self._checked < CHECK_S:
            return
        self._checked = time.monotonic()
        for tracked in list(self.queue):
            if (failure := self.stop_reason(tracked)) is not None:
                self.queue.remove(tracked)
                self.respond(tracked, encode(failure))

    def wait_next(self) -> TrackedRequest | None:
        """Wait for the next request and take it from the queue; return None once the engine has to end."""
        while not self.shutting_down:
            self.poll(wait_ms=0 if self.queue else None)
            if not self.shutting_down and (tracked := next_request(self.queue, self.turns, self.key)) is not None:
                self.queue.remove(tracked)
                self.charge(tracked, estimated_work(tracked.request))
                return tracked
        return None

    def charge(self, tracked: TrackedRequest, work: float) -> None:
        """Count work that begins now for the request's client."""
        self.turns.begin(tracked.turn)
        self.turns.charge(tracked.turn, work)

    def stop_reason(self, tracked: TrackedRequest) -> Failure | None:
        """Return why a request has to stop, or None if it may go on."""
        request_id = tracked.request.request_id
        if self._cancellations.is_cancelled(request_id):
            return Failure(request_id, "cancelled", "the request was cancelled")
        if tracked.client in self._disconnected:
            return Failure(request_id, "cancelled", "the client disconnected")
        if time.monotonic() >= tracked.deadline:
            waited = tracked.deadline - tracked.arrived
            return Failure(request_id, "expired", f"the request was not finished within {waited:g} s of its arrival")
        return None

    def with_stop_reason(self, tracked: TrackedRequest, frames: list[bytes]) -> list[bytes]:
        """Return the ranks' answer, with the reason for stopping in place of a bare "cancelled".

        The ranks know only that they stopped; rank 0 knows why.
        """
        answer, why = decode(frames), self.stop_reason(tracked)
        was_stopped = isinstance(answer, Failure) and answer.kind == "cancelled"
        return encode(why) if was_stopped and why is not None else frames

    def respond(self, tracked: TrackedRequest, frames: list[bytes]) -> None:
        """Send the one answer to a request."""
        del self._progress_sent[tracked.request.request_id]
        self._cancellations.forget(tracked.request.request_id)
        self._answers.append(time.monotonic())
        self._send(tracked.client, frames)

    def send_progress(self, tracked: TrackedRequest, stage: str, done: int, total: int, preview: bytes = b"") -> None:
        """Send progress to the client, while steps run every PROGRESS_INTERVAL_S at most, and every preview."""
        now, request_id = time.monotonic(), tracked.request.request_id
        if not preview and 0 < done < total and now - self._progress_sent[request_id] < PROGRESS_INTERVAL_S:
            return
        self._progress_sent[request_id] = now
        self._send(tracked.client, encode(Progress(request_id, stage, done, total, preview)))

    def close(self) -> None:
        """Answer all waiting requests: the engine ends."""
        for left in self.queue:
            self.respond(left, encode(_shut_down(left)))
        self.queue.clear()

    def _accept(self, frames: list[bytes], running: int) -> None:
        client, *body = frames
        self._disconnected.discard(client)
        try:
            message: Message = decode_message(body)
        except MessageError as error:
            log.warning("requests: %s", error)
            self._send(client, encode(rejection(error)))
            return
        if isinstance(message, Configure):
            self._send(client, self._change(message, running))
            return
        if not isinstance(message, GenerationRequest):
            failure = Failure(
                "", "rejected", f"{type(message).__name__} is not a request; send it to the control socket"
            )
            self._send(client, encode(failure))
            return
        timeout_s = self._timeout_s if message.timeout_s is None else min(message.timeout_s, self._timeout_s)
        if (refusal := self._refusal(message, timeout_s)) is not None:
            self._send(client, encode(refusal))
            return
        now = time.monotonic()
        tracked = TrackedRequest(client, message, now, now + timeout_s)
        self.queue.append(tracked)
        self.accepted += 1
        self._progress_sent[message.request_id] = now
        position = running + serving_order(self.queue, self.turns, self.key).index(tracked)
        self.send_progress(tracked, QUEUED, position, 0)

    def _change(self, message: Configure, running: int) -> list[bytes]:
        """Change the configuration of all ranks, unless requests were accepted by the old one."""
        if self._configure is None:
            return encode(Failure("", "rejected", "these ranks run one configuration; start others for another one"))
        if running or self.queue:
            return encode(Failure("", "rejected", "requests wait or run; send a configuration after their answers"))
        return self._configure(message)

    def _refusal(self, request: GenerationRequest, timeout_s: float) -> Failure | None:
        try:
            self._check(request)
            if request.request_id in self._progress_sent:
                raise ValueError(
                    f"a request with the id {request.request_id[:80]!r} is still open; the new one is refused and the "
                    "first goes on: use another id"
                )
            self.capacity.check(request, timeout_s)
        except ValueError as error:
            return Failure(request.request_id, "rejected", str(error))
        if self._limit is None or len(self.queue) < self._limit:
            return None
        hint = self._retry_after_s()
        return Failure(
            request.request_id,
            "busy",
            f"{len(self.queue)} requests wait, the limit of serve.max_queue; try again in {hint:.0f} s",
            retry_after_s=hint,
        )

    def _retry_after_s(self) -> float:
        """Return the time until there is room: the mean interval between the latest answers, at least 1 s."""
        times = self._answers
        return max(1.0, (times[-1] - times[0]) / (len(times) - 1)) if len(times) > 1 else 1.0

    def _send(self, client: bytes, frames: list[bytes]) -> None:
        """Send without waiting: any number of messages queue for a slow client, none for a disconnected one."""
        if not reply(self._requests, client, frames):
            self._disconnected.add(client)


def _shut_down(tracked: TrackedRequest) -> Failure:
    return Failure(tracked.request.request_id, "cancelled", "the engine was shut down before this request ran")
