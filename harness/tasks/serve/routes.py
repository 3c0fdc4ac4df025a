"""The routes: OpenAI's for pictures, videos and models, and our own for any request, its progress and its end."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse

from harness.config.schema import RunConfig
from harness.tasks.serve import openai
from harness.tasks.serve.parse import frames_of, to_request
from harness.tasks.serve.problem import Problem
from harness.tasks.serve.responses import address, defaults, drawn, request_object, size, video_object
from harness.tasks.serve.service import GenerationService, Order

FORM = {"requestBody": {"content": {"multipart/form-data": {"schema": {"$ref": "#/components/schemas/VideoRequest"}}}}}


def desk_of(http: Request) -> GenerationService:
    """The application's desk."""
    desk: GenerationService = http.app.state.service
    return desk


def order_of(request_id: str, http: Request) -> Order:
    """The request that a path names."""
    return desk_of(http).order(request_id)


def video_of(video_id: str, http: Request) -> Order:
    """The video that a path names."""
    order = desk_of(http).order(video_id)
    if not order.is_video:
        raise Problem("not_found", f"{video_id} is no video; see /v1/requests/{video_id}")
    return order


TheDesk = Annotated[GenerationService, Depends(desk_of)]
TheOrder = Annotated[Order, Depends(order_of)]
TheVideo = Annotated[Order, Depends(video_of)]


def model_routes() -> APIRouter:
    """Which model runs."""
    router, started = APIRouter(prefix="/v1/models", tags=["models"]), int(time.time())

    @router.get("")
    async def models(desk: TheDesk) -> openai.Models:
        """The one model that this server runs."""
        return openai.Models(data=[the_model(desk.config, started)])

    @router.get("/{model}")
    async def model(model: str, desk: TheDesk) -> openai.Model:
        """Whether a model runs here."""
        if model != desk.config.model.name:
            raise Problem("model_not_found", f"{model} does not run here; ask for {desk.config.model.name}", "model")
        return the_model(desk.config, started)

    return router


def the_model(config: RunConfig, started: int) -> openai.Model:
    """The model that runs, since `started`."""
    return openai.Model(id=config.model.name, created=started, triptych=defaults(config))


def image_routes() -> APIRouter:
    """Pictures, waited for."""
    router = APIRouter(prefix="/v1/images", tags=["images"])

    @router.post("/generations")
    async def images(asked: openai.ImageRequest, desk: TheDesk, http: Request) -> openai.ImagesResponse:
        """Draws pictures, and answers when they are drawn; a client that goes away cancels them."""
        if asked.triptych.frames not in (None, 1):
            raise Problem("rejected", "triptych.frames makes a video; post to /v1/videos", "triptych.frames")
        request = to_request(asked, 1 if asked.n is None else asked.n, 1, desk.config)
        order = desk.accept(request, asked.user)
        await wait(desk, order, http)
        files = desk.files(order)
        if asked.response_format == "url":
            data = [openai.Picture(url=address(http, order, k)) for k in range(len(files))]
        else:
            data = [openai.Picture(b64_json=text) for text in await asyncio.to_thread(in_base64, files)]
        return openai.ImagesResponse(created=int(time.time()), data=data, size=size(order), triptych=drawn(order))

    return router


def video_routes() -> APIRouter:
    """Videos, as jobs."""
    router = APIRouter(prefix="/v1/videos", tags=["videos"])

    @router.post("", openapi_extra=FORM)
    async def create(asked: openai.VideoRequest, desk: TheDesk) -> openai.Video:
        """Starts a video, and answers at once."""
        request = to_request(asked, 1, frames_of(asked, desk.config), desk.config)
        return video_object(desk.accept(request, asked.user), desk.config)

    @router.get("")
    async def videos(desk: TheDesk) -> openai.Videos:
        """The videos that are outstanding or kept, the newest first."""
        found = [video_object(order, desk.config) for order in desk.orders() if order.is_video]
        return openai.Videos(
            data=found, first_id=found[0].id if found else None, last_id=found[-1].id if found else None
        )

    @router.get("/{video_id}")
    async def video(order: TheVideo, desk: TheDesk) -> openai.Video:
        """How far a video is."""
        return video_object(order, desk.config)

    @router.get("/{video_id}/content", response_class=FileResponse)
    async def content(order: TheVideo, desk: TheDesk) -> FileResponse:
        """The MP4 of a video that is completed."""
        return file_of(desk, order, 0)

    @router.delete("/{video_id}")
    async def delete(order: TheVideo, desk: TheDesk) -> openai.VideoDeleted:
        """Stops a video that is outstanding, and removes it."""
        desk.forget(order)
        return openai.VideoDeleted(id=order.id)

    return router


def request_routes() -> APIRouter:
    """Any request, as a job."""
    router = APIRouter(prefix="/v1/requests", tags=["requests"])

    @router.post("", status_code=202)
    async def create(asked: openai.JobRequest, desk: TheDesk, http: Request) -> openai.RequestObject:
        """Queues pictures or videos, and answers at once."""
        request = to_request(asked, 1 if asked.n is None else asked.n, asked.triptych.frames, desk.config)
        return request_object(desk.accept(request, asked.user), http)

    @router.get("")
    async def requests(
        desk: TheDesk, http: Request, limit: Annotated[int, Query(ge=0, le=1000)] = 50
    ) -> openai.Requests:
        """The requests that are outstanding, and the last `limit` that are not; the newest first."""
        orders = desk.orders()
        kept = {order.id for order in [order for order in orders if order.settled.is_set()][:limit]}
        shown = [order for order in orders if order.id in kept or not order.settled.is_set()]
        return openai.Requests(data=[request_object(order, http) for order in shown])

    @router.get("/{request_id}")
    async def request(order: TheOrder, http: Request) -> openai.RequestObject:
        """How far a request is."""
        return request_object(order, http)

    @router.get("/{request_id}/events", response_class=EventSourceResponse)
    async def events(order: TheOrder, http: Request) -> AsyncIterator[openai.RequestObject]:
        """How far a request is, whenever that changes, until it is done or failed."""
        async for _ in order.job.events():
            yield request_object(order, http)
        await order.settled.wait()
        yield request_object(order, http)

    @router.get("/{request_id}/content/{index}", response_class=FileResponse)
    async def content(order: TheOrder, index: int, desk: TheDesk) -> FileResponse:
        """One picture or video of a request that is done."""
        return file_of(desk, order, index)

    @router.delete("/{request_id}", status_code=202)
    async def cancel(order: TheOrder, desk: TheDesk, http: Request) -> openai.RequestObject:
        """Stops a request: at once where it waits, within a solver step where it is drawn."""
        desk.cancel(order)
        return request_object(order, http)

    return router


async def wait(desk: GenerationService, order: Order, http: Request) -> None:
    """Until a request is settled; it is cancelled where its client goes away before that."""
    settled = asyncio.create_task(order.settled.wait())
    gone = asyncio.create_task(hung_up(http))
    try:
        await asyncio.wait((settled, gone), return_when=asyncio.FIRST_COMPLETED)
        if not settled.done():
            desk.cancel(order)
            raise Problem("cancelled", "the client went away")
    finally:
        settled.cancel()
        gone.cancel()


async def hung_up(http: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def file_of(desk: GenerationService, order: Order, index: int) -> FileResponse:
    """One of a request's files."""
    files = desk.files(order)
    if not 0 <= index < len(files):
        raise Problem("not_found", f"request {order.id} has pictures 0 to {len(files) - 1}")
    if not files[index].is_file():
        raise Problem("not_found", f"picture {index} of request {order.id} was removed from the server's folder")
    kind = "image/png" if files[index].suffix == ".png" else "video/mp4"
    return FileResponse(files[index], media_type=kind, headers={"cache-control": "private, max-age=86400, immutable"})


def in_base64(files: Sequence[Path]) -> list[str]:
    """What is in files."""
    return [base64.b64encode(file.read_bytes()).decode() for file in files]
