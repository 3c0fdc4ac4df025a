"""Clients over HTTP: OpenAI's route for images, with one connection per outstanding request."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterator, Mapping

import httpx

from harness.config.load import Dialect
from harness.metrics.load import INVALID, LOST, OK
from harness.tasks.load.answers import AnswerError, check_images, fetch_bytes, read_images, read_refusal
from harness.tasks.load.arrivals import ArrivalSchedule, LoadRequest
from harness.tasks.load.dialects import DIALECTS, ROUTE, Wire
from harness.tasks.load.tracker import RequestTracker
from harness.tasks.load.zeromq import BACKOFF_S

EVALUATIONS = re.compile(r"^triptych_evaluations_total (\S+)$", re.MULTILINE)
OWN = Wire()


def key_header(dialect: Dialect = Dialect.triptych) -> dict[str, str]:
    """Return the header with the API key of a dialect's variable, or none if it is not set.

    Args:
        dialect: The dialect of the server.
    """
    key = os.environ.get(DIALECTS[dialect].key)
    return {} if key is None else {"authorization": f"Bearer {key}"}


async def drive(
    client: httpx.AsyncClient,
    schedule: ArrivalSchedule,
    requests: Iterator[LoadRequest],
    on_change: Callable[[RequestTracker], None] = lambda tracker: None,
    wire: Wire = OWN,
) -> RequestTracker:
    """Send requests when they are due, until every request is answered; the client's timeout limits the wait.

    Args:
        client: The HTTP client, with the server's base URL.
        schedule: The times at which to send.
        requests: The requests to send, as many as the schedule may ask for.
        on_change: A function that is called with the tracker now and then, to show progress.
        wire: How requests are written.

    Returns:
        The tracker with all requests; every image has been decoded.
    """
    tracker, tasks = RequestTracker(), set[asyncio.Task[None]]()
    while schedule.next_due is not None or tasks:
        while (due := schedule.next_due) is not None and due <= tracker.clock():
            request = next(requests)
            tracker.record_sent(request, schedule.pop())
            tasks.add(asyncio.create_task(_send(client, request, tracker, schedule, wire, tasks)))
        on_change(tracker)
        wait_s = None if due is None else max(0.0, due - tracker.clock())
        if tasks:
            done, _ = await asyncio.wait(tasks, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            tasks -= done
            for task in done:
                task.result()
        elif wait_s is not None:
            await asyncio.sleep(wait_s)
    return tracker


async def _send(
    client: httpx.AsyncClient,
    request: LoadRequest,
    tracker: RequestTracker,
    schedule: ArrivalSchedule,
    wire: Wire,
    tasks: set[asyncio.Task[None]],
) -> None:
    """Send one request and record its outcome; a broken connection makes it lost.

    The images are decoded in a task of their own, so that a client of a closed loop does not wait for it.
    """
    sent_s, wait_s = tracker.clock(), 0.0
    try:
        response = await client.post(ROUTE, json=wire.body(request))
        if response.is_success:
            images = read_images(response)
            files = await fetch_bytes(client, response, images)
            if images.triptych is not None:
                tracker.record_started(request.request_id, sent_s + images.triptych.queued_ms / 1e3)
            tracker.record_answer(request.request_id, OK)
            tasks.add(asyncio.create_task(_check(request, files, tracker)))
        else:
            refusal = read_refusal(response, wire.dialect is Dialect.triptych)
            tracker.record_answer(request.request_id, refusal.kind, refusal.message)
            wait_s = retry_wait_s(response.headers)
    except httpx.HTTPError as error:
        tracker.record_answer(request.request_id, LOST, f"{type(error).__name__}: {error}")
        wait_s = BACKOFF_S
    except AnswerError as error:
        tracker.record_answer(request.request_id, INVALID, str(error))
        wait_s = BACKOFF_S
    schedule.on_answer(tracker.clock(), wait_s)


async def _check(request: LoadRequest, files: list[bytes], tracker: RequestTracker) -> None:
    """Decode the images of an answer in a thread and record their size, or that they are not what was requested."""
    try:
        tracker.record_size(request.request_id, await asyncio.to_thread(check_images, request, files))
    except AnswerError as error:
        tracker.record_invalid(request.request_id, str(error))


def retry_wait_s(headers: Mapping[str, str]) -> float:
    """Return how long a refused client waits before it sends again, seconds; a date in the header is not read."""
    try:
        return max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        return BACKOFF_S


async def read_evaluations(client: httpx.AsyncClient) -> int | None:
    """Return the number of the denoiser's forwards so far, or None if the server does not report it."""
    try:
        found = EVALUATIONS.search((await client.get("/metrics")).text)
    except httpx.HTTPError:
        return None
    return None if found is None else int(float(found[1]))
