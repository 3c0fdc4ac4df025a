"""The shapes of OpenAI's API for pictures and videos, with what is ours in one object, `triptych`.

Fields of OpenAI's that would have no effect here are accepted only with the value that says so.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, AllowInfNan, BaseModel


def readable(text: str) -> str:
    """The text itself; JSON can spell half a surrogate pair, which is no character and could be sent to nobody.

    Raises:
        ValueError: it has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no character; send the whole pair") from None
    return text


Text = Annotated[str, AfterValidator(readable)]
Number = Annotated[float, AllowInfNan(False)]
Status: TypeAlias = Literal["queued", "running", "done", "failed"]


class Settings(BaseModel, extra="forbid"):
    """`triptych` of a request; what is left out is the server's own `request` configuration.

    `seed` is drawn where it is left out, and told in the answer; picture k has seed + k. `timeout_s` counts from the
    request's arrival. `scheduler` names the noise scheduler that the client takes for granted; another one than the
    server runs is refused.
    """

    steps: int | None = None
    seed: int | None = None
    guidance: Number | None = None
    negative_prompt: Text | None = None
    timeout_s: Number | None = None
    frames: int | None = None
    scheduler: Text | None = None


class Asked(BaseModel, extra="forbid"):
    """What every request has. `size` is WIDTHxHEIGHT in pixels; null or auto is the server's own."""

    prompt: Text
    model: Text | None = None
    size: Text | None = None
    user: Text | None = None
    triptych: Settings = Settings()


class JobRequest(Asked):
    """`POST /v1/requests`: n pictures or videos, asked for without waiting."""

    n: int | None = None


class ImageRequest(JobRequest):
    """`POST /v1/images/generations`."""

    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = None
    safety_identifier: Text | None = None


class VideoRequest(Asked):
    """`POST /v1/videos`. `seconds` becomes the nearest number of frames that the model can make."""

    seconds: Number | None = None


class Picture(BaseModel):
    """One picture: a PNG in base64, or its address."""

    b64_json: str | None = None
    url: str | None = None


class Drawn(BaseModel):
    """`triptych` of an answer: what was drawn, and how long it took."""

    request_id: str
    seed: int
    steps: int
    guidance: float
    queued_ms: float
    total_ms: float


class ImagesResponse(BaseModel):
    """The answer to `POST /v1/images/generations`."""

    created: int
    data: list[Picture]
    output_format: Literal["png"] = "png"
    size: str
    triptych: Drawn


class JobError(BaseModel):
    """Why a job has no picture."""

    code: str
    message: str


class Video(BaseModel):
    """One video job; `progress` in percent."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    prompt: str
    seconds: str
    size: str
    error: JobError | None


class Videos(BaseModel):
    """Video jobs, the newest first."""

    object: Literal["list"] = "list"
    data: list[Video]
    has_more: bool = False
    first_id: str | None
    last_id: str | None


class VideoDeleted(BaseModel):
    """The answer to `DELETE /v1/videos/{id}`."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class Defaults(BaseModel):
    """What a request that says nothing gets, and how much one may ask for. Sizes in pixels."""

    scheduler: str
    solver: str
    steps: int
    guidance: float
    size: str
    frames: int
    fps: int
    size_multiple: int
    max_pixels: int
    max_steps: int
    max_pictures: int
    max_frames: int
    timeout_s: float


class Model(BaseModel):
    """The model that this server runs; `created` is when it started."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "triptych"
    triptych: Defaults


class Models(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class RequestObject(BaseModel):
    """One request: how far it is, and where its pictures are. Times in seconds since 1970.

    `ahead` requests are before it while it is queued; `done` of `total` solver steps.
    """

    id: str
    object: Literal["request"] = "request"
    status: Status
    stage: str
    ahead: int
    done: int
    total: int
    prompt: str
    n: int
    steps: int
    seed: int
    guidance: float
    size: str
    frames: int
    created_at: float
    began_at: float | None
    completed_at: float | None
    urls: list[str]
    error: JobError | None


class Requests(BaseModel):
    """`GET /v1/requests`: the newest first."""

    object: Literal["list"] = "list"
    data: list[RequestObject]


class Health(BaseModel):
    """`/health` and `/ready`. `state`: starting, ready, restarting, failed or stopping, and why it is not ready."""

    state: str
    reason: str
    model: str
    ranks: int
    queued: int
    running: int
    restarts: int
