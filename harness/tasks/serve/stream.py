"""A stream of server-sent events for images: previews on the way, then the images, as OpenAI's API has them."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator

from pydantic import BaseModel

from harness.config.schema import RunConfig
from harness.tasks.serve import openai
from harness.tasks.serve.problem import Problem
from harness.tasks.serve.responses import generation_info, read_base64, size_text
from harness.tasks.serve.service import GenerationService, RequestHandle

QUIET_S = 15.0  # a comment after this time without an event keeps proxies from closing the connection
MEDIA_TYPE = "text/event-stream"


async def image_events(
    service: GenerationService, handle: RequestHandle, quality: openai.Quality | None, http_id: str
) -> AsyncIterator[str]:
    """Stream a request; if its client disconnects before the end, the request is cancelled.

    Args:
        service: The generation service.
        handle: The handle of the request.
        quality: The quality that the client asked for.
        http_id: The id of the HTTP request.

    Yields:
        Server-sent events: partial images, then one event for each image, or an error.
    """
    job, sent = handle.job, 0
    try:
        while True:
            changed, answered = job.changed, job.answered
            for preview in job.previews[sent:]:
                yield to_event(partial_image(handle, quality, preview, sent))
                sent += 1
            if answered:
                break
            try:
                await asyncio.wait_for(changed.wait(), QUIET_S)
            except TimeoutError:
                yield ": the request goes on\n\n"
        await handle.settled.wait()
        for text in await asyncio.to_thread(read_base64, handle, service.files(handle)):
            yield to_event(completed(handle, quality, text, service.config))
    except Problem as problem:
        yield f"event: error\ndata: {problem.body(http_id).model_dump_json()}\n\n"
    finally:
        service.cancel(handle)  # one that is settled stays as it is


def partial_image(
    handle: RequestHandle, quality: openai.Quality | None, preview: bytes, index: int
) -> openai.PartialImageEvent:
    """Return the event of a preview, a PNG."""
    return openai.PartialImageEvent(
        b64_json=base64.b64encode(handle.encoding.convert(preview)).decode(),
        created_at=int(time.time()),
        output_format=handle.encoding.format,
        quality=quality or "auto",
        size=size_text(handle),
        partial_image_index=index,
    )


def completed(
    handle: RequestHandle, quality: openai.Quality | None, text: str, config: RunConfig
) -> openai.CompletedEvent:
    """Return the event of an image, in base64."""
    return openai.CompletedEvent(
        b64_json=text,
        created_at=int(time.time()),
        output_format=handle.encoding.format,
        quality=quality or "auto",
        size=size_text(handle),
        triptych=generation_info(handle, config),
    )


def to_event(message: BaseModel) -> str:
    """Return a message as a server-sent event, which has the name of its type."""
    return f"event: {message.model_dump()['type']}\ndata: {message.model_dump_json()}\n\n"
