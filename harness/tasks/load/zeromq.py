"""Clients over ZeroMQ: one thread and one DEALER, on which any number of requests are outstanding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from harness.messages import QUEUED, Failure, GenerationRequest, GenerationResult, Message, Progress
from harness.metrics.load import OK
from harness.serving.transport import Connection
from harness.tasks.load.arrivals import ArrivalSchedule
from harness.tasks.load.tracker import RequestTracker

BACKOFF_S = 0.1  # of a closed loop's client that was refused, where the answer does not say
LISTEN_S = 0.1  # after the last answer, for one that is given twice


def drive(
    connection: Connection,
    schedule: ArrivalSchedule,
    requests: Iterator[GenerationRequest],
    patience_s: float,
    tell: Callable[[RequestTracker], None] = lambda account: None,
) -> RequestTracker:
    """Sends what is due, takes what comes, and ends when everything is answered. Whatever ends it earlier, what is
    outstanding is cancelled.

    Args:
        connection: to the engine.
        schedule: when to send.
        requests: what.
        patience_s: after the last was sent; what is not answered by then is lost.
        tell: told of the account now and then.

    Raises:
        EngineGone: the engine died.
    """
    account, last_s = RequestTracker(), 0.0
    try:
        while True:
            while (due := schedule.next_due) is not None and due <= account.clock():
                request, last_s = next(requests), schedule.take()
                account.sent(request, last_s)
                connection.send(request)
            tell(account)
            if due is None and (not account.outstanding or account.clock() > last_s + patience_s):
                break
            wait_s = math.inf if due is None else due - account.clock()
            if (message := connection.receive_within(wait_s)) is not None:
                take(message, account, schedule)
        until_s = account.clock() + LISTEN_S
        while (left_s := until_s - account.clock()) > 0:
            if (message := connection.receive_within(left_s)) is not None:
                take(message, account, schedule)
    finally:
        for request_id in account.outstanding:
            connection.cancel(request_id)
    return account


def take(message: Message, account: RequestTracker, schedule: ArrivalSchedule) -> None:
    """Accounts for one message of the engine."""
    if isinstance(message, Progress):
        if message.stage != QUEUED:
            account.began(message.request_id)
    elif isinstance(message, GenerationResult):
        if account.answered(message.request_id, OK):
            schedule.answered(account.clock(), 0.0)
    elif isinstance(message, Failure):
        wait_s = BACKOFF_S if message.retry_after_s is None else message.retry_after_s
        if account.answered(message.request_id, message.kind, message.message):
            schedule.answered(account.clock(), wait_s)
