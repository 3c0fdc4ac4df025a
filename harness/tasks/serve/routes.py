"""The API routes: OpenAI's for images, videos and models, and this project's own for the state of any request."""

from __future__ import annotations

import asyncio
import stat
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi.sse import EventSourceResponse

from harness.config.bounds import MAX_IMAGES
from harness.config.schema import RunConfig
from harness.tasks.serve import openai
from harness.tasks.serve.access import KEY_CLIENT
from harness.tasks.serve.image_files import MEDIA_TYPES
from harness.tasks.serve.parse import parse_encoding, quality_of, to_request, video_frames
from harness.tasks.serve.problem import Problem, http_id_of
from harness.tasks.serve.responses import (
    content_url,
    defaults,
    file_name,
    generation_info,
    read_base64,
    removal,
    request_object,
    size_text,
    video_object,
)
from harness.tasks.serve.service import GenerationService, RequestHandle
from harness.tasks.serve.stream import MEDIA_TYPE, image_events

Id = Annotated[str, PathParameter(max_length=128)]
STREAM = {MEDIA_TYPE: {"schema": {"type": "string"}}}
NO_BUFFER = {"cache-control": "no-cache", "x-accel-buffering": "no"}
FORM = {"requestBody": {"content": {"multipart/form-data": {"schema": {"$ref": "#/components/schemas/VideoRequest"}}}}}


def service_of(http: Request) -> GenerationService:
    """Return the application's generation service."""
    service: GenerationService = http.app.state.service
    return service


def client_of(http: Request) -> str:
    """Return whose HTTP request it is, as the middleware found it."""
    client: str = http.state.client
    return client


def is_visible(handle: RequestHandle, client: str) -> bool:
    """Return whether a client may see a request: on a server with keys it sees its own alone."""
    return not client.startswith(KEY_CLIENT) or handle.job.request.client == client


def request_handle(request_id: Id, http: Request) -> RequestHandle:
    """Return the request that a path names.

    Args:
        request_id: The id in the path.
        http: The HTTP request.

    Raises:
        Problem: The client has no such request.
    """
    handle = service_of(http).find(request_id)
    if not is_visible(handle, client_of(http)):
        raise Problem("not_found", f"there is no request {request_id}; /v1/requests lists those that are stored")
    return handle


def video_handle(video_id: Id, http: Request) -> RequestHandle:
    """Return the video that a path names.

    Args:
        video_id: The id in the path.
        http: The HTTP request.

    Raises:
        Problem: There is no such request, or it is not a video.
    """
    handle = request_handle(video_id, http)
    if not handle.is_video:
        raise Problem("not_found", f"{video_id} is not a video; see /v1/requests/{video_id}")
    return handle


def visible_handles(http: Request) -> list[RequestHandle]:
    """Return the requests that the client may see, the newest first."""
    client = client_of(http)
    return [handle for handle in service_of(http).handles() if is_visible(handle, client)]


ServiceDep = Annotated[GenerationService, Depends(service_of)]
ClientDep = Annotated[str, Depends(client_of)]
HandlesDep = Annotated[list[RequestHandle], Depends(visible_handles)]
RequestDep = Annotated[RequestHandle, Depends(request_handle)]
VideoDep = Annotated[RequestHandle, Depends(video_handle)]


def model_routes() -> APIRouter:
    """Return the routes that name the model."""
    router, started = APIRouter(prefix="/v1/models", tags=["models"]), int(time.time())

    @router.get("")
    async def models(service: ServiceDep) -> openai.Models:
        """List the one model that this server runs."""
        return openai.Models(data=[model_object(service.config, started)])

    @router.get("/{model}")
    async def model(model: str, service: ServiceDep) -> openai.Model:
        """Return a model if it runs here."""
        name = service.config.model.name
        if model != name:
            raise Problem("model_not_found", f"model {model} is not served here; use {name}", "model")
        return model_object(service.config, started)

    return router


def model_object(config: RunConfig, started: int) -> openai.Model:
    """Return the model that runs; `started` is the start of the server, seconds since 1970."""
    return openai.Model(id=config.model.name, created=started, triptych=defaults(config))


def image_routes() -> APIRouter:
    """Return the route that generates images while the client waits."""
    router = APIRouter(prefix="/v1/images", tags=["images"])

    @router.post("/generations", response_model=openai.ImagesResponse, responses={200: {"content": STREAM}})
    async def images(
        body: openai.ImageRequest, service: ServiceDep, client: ClientDep, http: Request
    ) -> openai.ImagesResponse | Response:
        """Generate images and answer when they are done, or stream them; a client that disconnects cancels them."""
        if body.triptych.frames not in (None, 1):
            raise Problem("rejected", "triptych.frames makes a video; post to /v1/videos", "triptych.frames")
        encoding, quality = parse_encoding(body), quality_of(body)
        request = to_request(body, 1 if body.n is None else body.n, 1, service.config)
        handle = service.submit(request, body.safety_identifier or body.user, client, encoding, http_id_of(http))
        if body.stream:
            return StreamingResponse(
                image_events(service, handle, quality, http_id_of(http)), media_type=MEDIA_TYPE, headers=NO_BUFFER
            )
        await wait_settled(service, handle, http)
        files = service.files(handle)
        if body.response_format == "url":
            data = [openai.ImageData(url=content_url(http, handle, k)) for k in range(len(files))]
        else:
            texts = await asyncio.to_thread(read_base64, handle, files)
            data = [openai.ImageData(b64_json=text) for text in texts]
        return openai.ImagesResponse(
            created=int(time.time()),
            data=data,
            output_format=encoding.format,
            quality=quality,
            size=size_text(handle),
            triptych=generation_info(handle, service.config),
        )

    return router


def video_routes() -> APIRouter:
    """Return the routes that generate videos in the background."""
    router = APIRouter(prefix="/v1/videos", tags=["videos"])

    @router.post("", openapi_extra=FORM)
    async def create(body: openai.VideoRequest, service: ServiceDep, client: ClientDep, http: Request) -> openai.Video:
        """Queue a video and answer at once."""
        request = to_request(body, 1, video_frames(body, service.config), service.config)
        handle = service.submit(request, body.user, client, http_id=http_id_of(http))
        return video_object(handle, service.config)

    @router.get("")
    async def videos(service: ServiceDep, handles: HandlesDep) -> openai.Videos:
        """List the videos that are outstanding or stored, the newest first."""
        found = [video_object(handle, service.config) for handle in handles if handle.is_video]
        return openai.Videos(
            data=found, first_id=found[0].id if found else None, last_id=found[-1].id if found else None
        )

    @router.get("/{video_id}")
    async def video(handle: VideoDep, service: ServiceDep) -> openai.Video:
        """Return the progress of a video."""
        return video_object(handle, service.config)

    @router.get("/{video_id}/content", response_class=FileResponse)
    async def content(handle: VideoDep, service: ServiceDep, http: Request) -> FileResponse:
        """Return the MP4 file of a completed video."""
        return file_response(service, handle, 0, http)

    @router.delete("/{video_id}")
    async def delete(handle: VideoDep, service: ServiceDep) -> openai.VideoDeleted:
        """Cancel a video if it is outstanding, and remove it."""
        service.delete(handle)
        return openai.VideoDeleted(id=handle.id)

    return router


def request_routes() -> APIRouter:
    """Return the routes for any request as a background job."""
    router = APIRouter(prefix="/v1/requests", tags=["requests"])

    @router.post("", status_code=202)
    async def create(
        body: openai.JobRequest, service: ServiceDep, client: ClientDep, http: Request
    ) -> openai.RequestObject:
        """Queue images or videos and answer at once."""
        request = to_request(body, 1 if body.n is None else body.n, None, service.config)
        return request_object(service.submit(request, body.user, client, http_id=http_id_of(http)), http)

    @router.get("")
    async def requests(
        handles: HandlesDep, http: Request, limit: Annotated[int, Query(ge=0, le=1000)] = 50
    ) -> openai.Requests:
        """List all outstanding requests and the last `limit` answered ones, the newest first."""
        recent = {handle.id for handle in [handle for handle in handles if handle.settled.is_set()][:limit]}
        listed = [handle for handle in handles if handle.id in recent or not handle.settled.is_set()]
        return openai.Requests(data=[request_object(handle, http) for handle in listed])

    @router.get("/{request_id}")
    async def request(handle: RequestDep, http: Request) -> openai.RequestObject:
        """Return the progress of a request."""
        return request_object(handle, http, handle.job.previews[-1] if handle.job.previews else None)

    @router.get("/{request_id}/events", response_class=EventSourceResponse)
    async def events(handle: RequestDep, http: Request) -> AsyncIterator[openai.RequestObject]:
        """Stream the progress of a request after each change, until it is done or failed; a preview comes once."""
        seen = 0
        async for job in handle.job.events():
            new, seen = job.previews[seen:], max(seen, len(job.previews))
            yield request_object(handle, http, new[-1] if new else None)
        await handle.settled.wait()
        yield request_object(handle, http)

    @router.get("/{request_id}/content/{index}", response_class=FileResponse)
    async def content(
        handle: RequestDep,
        index: Annotated[int, PathParameter(ge=0, lt=MAX_IMAGES)],
        service: ServiceDep,
        http: Request,
    ) -> FileResponse:
        """Return one image or video of a request that is done."""
        return file_response(service, handle, index, http)

    @router.delete("/{request_id}", status_code=202)
    async def cancel(handle: RequestDep, service: ServiceDep, http: Request) -> openai.RequestObject:
        """Cancel a request: at once while it is queued, within one solver step while it runs."""
        service.cancel(handle)
        return request_object(handle, http)

    return router


async def wait_settled(service: GenerationService, handle: RequestHandle, http: Request) -> None:
    """Wait until a request is settled; cancel it if its client disconnects first.

    Args:
        service: The generation service.
        handle: The handle of the request.
        http: The HTTP request of the waiting client.

    Raises:
        Problem: The client disconnected.
    """
    settled = asyncio.create_task(handle.settled.wait())
    gone = asyncio.create_task(wait_disconnected(http))
    try:
        await asyncio.wait((settled, gone), return_when=asyncio.FIRST_COMPLETED)
        if not settled.done():
            service.cancel(handle)
            raise Problem("cancelled", "the client disconnected")
    finally:
        settled.cancel()
        gone.cancel()


async def wait_disconnected(http: Request) -> None:
    """Wait until the client closes its connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def file_response(service: GenerationService, handle: RequestHandle, index: int, http: Request) -> FileResponse:
    """Return one file of a request, or the range of it that the client wants.

    Args:
        service: The generation service.
        handle: The handle of the request.
        index: The index of the image or video within the request.
        http: The HTTP request.

    Raises:
        Problem: The request has no such file, is not done, its file was removed, or the range is past its end.
    """
    files = service.files(handle)
    if not 0 <= index < len(files):
        raise Problem("not_found", f"request {handle.id} has samples 0 to {len(files) - 1}; use one of these")
    try:
        found = files[index].stat()
    except OSError:
        raise Problem("not_found", removal(handle, index)) from None
    if not stat.S_ISREG(found.st_mode):
        raise Problem("not_found", removal(handle, index))
    start, _, end = http.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
    if start and end and int(end) < int(start):
        raise Problem("rejected", f"Range: bytes={start}-{end} ends before it begins; turn it round")
    if start and int(start) >= found.st_size:
        raise Problem("no_such_range", f"the file has {found.st_size} bytes; use a range that begins before its end")
    media_type = MEDIA_TYPES[files[index].suffix]
    headers = {"cache-control": "private, max-age=86400, immutable"}
    return FileResponse(
        files[index],
        media_type=media_type,
        headers=headers,
        stat_result=found,
        filename=file_name(handle, index, files[index].suffix),
        content_disposition_type="inline",
    )
