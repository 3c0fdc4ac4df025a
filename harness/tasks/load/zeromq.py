"""Clients over ZeroMQ: one thread and one DEALER socket, with any number of outstanding requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from harness.messages import QUEUED, Failure, GenerationRequest, GenerationResult, Message, Progress
from harness.metrics.load import OK
from harness.serving.transport import Connection
from harness.tasks.load.arrivals import ArrivalSchedule
from harness.tasks.load.tracker import RequestTracker

BACKOFF_S = 0.1  # the wait of a refused client in a closed loop, if the answer names no time
LISTEN_S = 0.1  # the wait after the last answer, to catch an answer that is sent twice


def drive(
    connection: Connection,
    schedule: ArrivalSchedule,
    requests: Iterator[GenerationRequest],
    patience_s: float,
    on_change: Callable[[RequestTracker], None] = lambda tracker: None,
) -> RequestTracker:
    """Send requests when they are due and receive answers, until every request is answered.

    If this ends early for any reason, the outstanding requests are cancelled.

    Args:
        connection: The connection to the engine.
        schedule: The times at which to send.
        requests: The requests to send, without end.
        patience_s: The time to wait after the last request was sent, seconds; requests still unanswered are lost.
        on_change: A function that is called with the tracker now and then, to show progress.

    Returns:
        The tracker with all requests.

    Raises:
        EngineGone: The engine died.
    """
    tracker, last_s = RequestTracker(), 0.0
    try:
        while True:
            while (due := schedule.next_due) is not None and due <= tracker.clock():
                request, last_s = next(requests), schedule.pop()
                tracker.record_sent(request, last_s)
                connection.send(request)
            on_change(tracker)
            if due is None and (not tracker.outstanding or tracker.clock() > last_s + patience_s):
                break
            wait_s = math.inf if due is None else due - tracker.clock()
            if (message := connection.receive_within(wait_s)) is not None:
                record_message(message, tracker, schedule)
        until_s = tracker.clock() + LISTEN_S
        while (left_s := until_s - tracker.clock()) > 0:
            if (message := connection.receive_within(left_s)) is not None:
                record_message(message, tracker, schedule)
    finally:
        for request_id in tracker.outstanding:
            connection.cancel(request_id)
    return tracker


def record_message(message: Message, tracker: RequestTracker, schedule: ArrivalSchedule) -> None:
    """Record one message of the engine, and schedule the next request of a client that got its answer.

    Args:
        message: The engine's message.
        tracker: The tracker of the requests.
        schedule: The times at which to send.
    """
    if isinstance(message, Progress):
        if message.stage != QUEUED:
            tracker.record_started(message.request_id)
    elif isinstance(message, GenerationResult):
        if tracker.record_answer(message.request_id, OK):
            schedule.on_answer(tracker.clock(), 0.0)
    elif isinstance(message, Failure):
        wait_s = BACKOFF_S if message.retry_after_s is None else message.retry_after_s
        if tracker.record_answer(message.request_id, message.kind, message.message):
            schedule.on_answer(tracker.clock(), wait_s)
