"""Clients over HTTP: OpenAI's route for images, with one connection per outstanding request."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterator, Mapping

import httpx
import msgspec

from harness.messages import GenerationRequest
from harness.metrics.load import LOST, OK
from harness.tasks.load.arrivals import ArrivalSchedule
from harness.tasks.load.tracker import RequestTracker
from harness.tasks.load.zeromq import BACKOFF_S
from harness.tasks.serve.access import KEY_VARIABLE

ROUTE = "/v1/images/generations"
EVALUATIONS = re.compile(r"^triptych_evaluations_total (\S+)$", re.MULTILINE)


class TimingPayload(msgspec.Struct):
    """The field that is read from the object `triptych` of an answer."""

    queued_ms: float = 0.0


class ErrorPayload(msgspec.Struct):
    """The fields that are read from an error."""

    code: str = "failed"
    message: str = ""


class ResponsePayload(msgspec.Struct):
    """The fields that are read from any answer, with or without an error."""

    triptych: TimingPayload = msgspec.field(default_factory=TimingPayload)
    error: ErrorPayload = msgspec.field(default_factory=ErrorPayload)


def key_header() -> dict[str, str]:
    """Return the header with the API key in TRIPTYCH_API_KEY, or none if it is not set."""
    key = os.environ.get(KEY_VARIABLE)
    return {} if key is None else {"authorization": f"Bearer {key}"}


def request_body(request: GenerationRequest) -> dict[str, object]:
    """Return a request as a JSON body of OpenAI's API, with this project's own options in `triptych`."""
    options = {
        "steps": request.steps,
        "seed": request.seed,
        "guidance": request.guidance,
        "negative_prompt": request.negative_prompt,
        "timeout_s": request.timeout_s,
    }
    size = f"{request.width}x{request.height}"
    n = request.samples_per_prompt
    return {"prompt": request.prompts[0], "n": n, "size": size, "response_format": "b64_json", "triptych": options}


async def drive(
    client: httpx.AsyncClient,
    schedule: ArrivalSchedule,
    requests: Iterator[GenerationRequest],
    on_change: Callable[[RequestTracker], None] = lambda tracker: None,
) -> RequestTracker:
    """Send requests when they are due, until every request is answered; the client's timeout limits the wait.

    Args:
        client: The HTTP client, with the server's base URL.
        schedule: The times at which to send.
        requests: The requests to send, without end.
        on_change: A function that is called with the tracker now and then, to show progress.

    Returns:
        The tracker with all requests.
    """
    tracker, tasks = RequestTracker(), set[asyncio.Task[None]]()
    while schedule.next_due is not None or tasks:
        while (due := schedule.next_due) is not None and due <= tracker.clock():
            request = next(requests)
            tracker.record_sent(request, schedule.pop())
            tasks.add(asyncio.create_task(_send(client, request, tracker, schedule)))
        on_change(tracker)
        wait_s = None if due is None else max(0.0, due - tracker.clock())
        if tasks:
            done, tasks = await asyncio.wait(tasks, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        elif wait_s is not None:
            await asyncio.sleep(wait_s)
    return tracker


async def _send(
    client: httpx.AsyncClient, request: GenerationRequest, tracker: RequestTracker, schedule: ArrivalSchedule
) -> None:
    """Send one request and record its outcome; a broken connection makes it lost."""
    sent_s = tracker.clock()
    try:
        response = await client.post(ROUTE, json=request_body(request))
    except httpx.HTTPError as error:
        tracker.record_answer(request.request_id, LOST, f"{type(error).__name__}: {error}")
        schedule.on_answer(tracker.clock(), BACKOFF_S)
        return
    payload = msgspec.json.decode(response.content, type=ResponsePayload)
    if response.is_success:
        tracker.record_started(request.request_id, sent_s + payload.triptych.queued_ms / 1e3)
        tracker.record_answer(request.request_id, OK)
        schedule.on_answer(tracker.clock(), 0.0)
        return
    tracker.record_answer(request.request_id, payload.error.code, payload.error.message)
    schedule.on_answer(tracker.clock(), retry_wait_s(response.headers))


def retry_wait_s(headers: Mapping[str, str]) -> float:
    """Return how long a refused client waits before it sends again, seconds."""
    return float(headers["retry-after"]) if "retry-after" in headers else BACKOFF_S


async def read_evaluations(client: httpx.AsyncClient) -> int | None:
    """Return the number of the denoiser's forwards so far, or None if the server does not report it."""
    found = EVALUATIONS.search((await client.get("/metrics")).text)
    return None if found is None else int(float(found[1]))
