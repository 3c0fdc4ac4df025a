"""Clients over HTTP: OpenAI's route for pictures, one connection for every request that is outstanding."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping

import httpx
import msgspec

from harness.messages import GenerationRequest
from harness.metrics.load import LOST, OK
from harness.tasks.load.arrivals import ArrivalSchedule
from harness.tasks.load.tracker import RequestTracker
from harness.tasks.load.zeromq import BACKOFF_S

ROUTE = "/v1/images/generations"
EVALUATIONS = re.compile(r"^triptych_evaluations_total (\S+)$", re.MULTILINE)


class Drawn(msgspec.Struct):
    """What is read of `triptych` in an answer."""

    queued_ms: float = 0.0


class Error(msgspec.Struct):
    """What is read of an error."""

    code: str = "failed"
    message: str = ""


class Answer(msgspec.Struct):
    """What is read of an answer, good or bad."""

    triptych: Drawn = msgspec.field(default_factory=Drawn)
    error: Error = msgspec.field(default_factory=Error)


def body(request: GenerationRequest) -> dict[str, object]:
    """A request as OpenAI's clients send it, with what is ours in `triptych`."""
    own = {
        "steps": request.steps,
        "seed": request.seed,
        "guidance": request.guidance,
        "negative_prompt": request.negative_prompt,
        "timeout_s": request.timeout_s,
    }
    size = f"{request.width}x{request.height}"
    n = request.samples_per_prompt
    return {"prompt": request.prompts[0], "n": n, "size": size, "response_format": "b64_json", "triptych": own}


async def drive(
    client: httpx.AsyncClient,
    schedule: ArrivalSchedule,
    requests: Iterator[GenerationRequest],
    tell: Callable[[RequestTracker], None] = lambda account: None,
) -> RequestTracker:
    """Sends what is due, and ends when everything is answered; the client's timeout bounds that.

    Args:
        client: of the server.
        schedule: when to send.
        requests: what.
        tell: told of the account now and then.
    """
    account, tasks = RequestTracker(), set[asyncio.Task[None]]()
    while schedule.next_due is not None or tasks:
        while (due := schedule.next_due) is not None and due <= account.clock():
            request = next(requests)
            account.sent(request, schedule.take())
            tasks.add(asyncio.create_task(_send(client, request, account, schedule)))
        tell(account)
        wait_s = None if due is None else max(0.0, due - account.clock())
        if tasks:
            done, tasks = await asyncio.wait(tasks, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        elif wait_s is not None:
            await asyncio.sleep(wait_s)
    return account


async def _send(
    client: httpx.AsyncClient, request: GenerationRequest, account: RequestTracker, schedule: ArrivalSchedule
) -> None:
    """One request and its outcome; a connection that breaks off leaves it lost."""
    sent_s = account.clock()
    try:
        response = await client.post(ROUTE, json=body(request))
    except httpx.HTTPError as error:
        account.answered(request.request_id, LOST, f"{type(error).__name__}: {error}")
        schedule.answered(account.clock(), BACKOFF_S)
        return
    answer = msgspec.json.decode(response.content, type=Answer)
    if response.is_success:
        account.began(request.request_id, sent_s + answer.triptych.queued_ms / 1e3)
        account.answered(request.request_id, OK)
        schedule.answered(account.clock(), 0.0)
        return
    account.answered(request.request_id, answer.error.code, answer.error.message)
    schedule.answered(account.clock(), wait_s(response.headers))


def wait_s(headers: Mapping[str, str]) -> float:
    """When a refused client comes again."""
    return float(headers["retry-after"]) if "retry-after" in headers else BACKOFF_S


async def evaluations(client: httpx.AsyncClient) -> int | None:
    """Forwards of the denoiser so far; None where the server does not tell."""
    found = EVALUATIONS.search((await client.get("/metrics")).text)
    return None if found is None else int(float(found[1]))
