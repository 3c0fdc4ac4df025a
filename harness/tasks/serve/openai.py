"""The bodies of OpenAI's API for images and videos, with this project's own fields in one object, `triptych`.

Fields of OpenAI's API that have no effect here are accepted only with the value that means so. `bounds.py` has the
bounds of the numbers.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, AllowInfNan, BaseModel, Field

from harness.resolve.limits import MAX_PROMPT_CHARS


def check_unicode(text: str) -> str:
    """Check that a text can be encoded; JSON can spell half of a surrogate pair, which is not a character.

    Args:
        text: The text of a JSON string.

    Returns:
        The same text.

    Raises:
        ValueError: The text contains half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is not a character; send the whole pair") from None
    return text


Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARS), AfterValidator(check_unicode)]
Label = Annotated[str, Field(max_length=256), AfterValidator(check_unicode)]
Size = Annotated[str, Field(max_length=16), AfterValidator(check_unicode)]
FiniteFloat = Annotated[float, AllowInfNan(False)]
RequestStatus: TypeAlias = Literal["queued", "running", "done", "failed"]


class GenerationOptions(BaseModel, extra="forbid"):
    """The object `triptych` of a request; a missing field means the server's own `request` configuration.

    Attributes:
        steps: The number of solver steps.
        seed: The seed of the first sample; sample k uses seed + k. Without it, the server picks a random seed and
            reports it in the answer.
        guidance: The scale of classifier-free guidance; 1 means no guidance.
        negative_prompt: The text to guide away from.
        timeout_s: The time limit in seconds, counted from the request's arrival.
        frames: The number of frames; more than one makes each sample a video.
        scheduler: The noise scheduler that the client expects; the server refuses any other than its own.
    """

    steps: int | None = None
    seed: int | None = None
    guidance: FiniteFloat | None = None
    negative_prompt: Prompt | None = None
    timeout_s: FiniteFloat | None = None
    frames: int | None = None
    scheduler: Label | None = None


class ParsedRequest(BaseModel, extra="forbid"):
    """The fields that every request has.

    Attributes:
        prompt: The text to generate from.
        model: The name of the model, if the client gives one.
        size: WIDTHxHEIGHT in pixels; null or auto means the server's own size.
        user: The client's name for its user.
        triptych: This project's own options.
    """

    prompt: Prompt
    model: Label | None = None
    size: Size | None = None
    user: Label | None = None
    triptych: GenerationOptions = GenerationOptions()


class JobRequest(ParsedRequest):
    """The body of `POST /v1/requests`: n images or videos, generated in the background."""

    n: int | None = None


class ImageRequest(JobRequest):
    """The body of `POST /v1/images/generations`."""

    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = None
    safety_identifier: Label | None = None


class VideoRequest(ParsedRequest):
    """The body of `POST /v1/videos`. `seconds` is rounded to the nearest number of frames that the model supports."""

    seconds: FiniteFloat | None = None


class ImageData(BaseModel):
    """One image: a PNG in base64, or its URL."""

    b64_json: str | None = None
    url: str | None = None


class GenerationInfo(BaseModel):
    """The object `triptych` of an answer.

    Attributes:
        request_id: The id of the request, for `/v1/requests`.
        seed: The seed of the first image.
        steps: The number of solver steps.
        guidance: The scale of classifier-free guidance.
        queued_ms: The time in the queue, ms.
        total_ms: The time from arrival to the engine's answer, ms.
    """

    request_id: str
    seed: int
    steps: int
    guidance: float
    queued_ms: float
    total_ms: float


class ImagesResponse(BaseModel):
    """The answer to `POST /v1/images/generations`."""

    created: int
    data: list[ImageData]
    output_format: Literal["png"] = "png"
    size: str
    triptych: GenerationInfo


class JobError(BaseModel):
    """The reason why a request failed."""

    code: str
    message: str


class Video(BaseModel):
    """One video job; `progress` is in percent."""

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
    """A list of video jobs, the newest first."""

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
    """The values that a request gets for missing fields, and the server's limits. Sizes are in pixels."""

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
    max_images: int
    max_frames: int
    timeout_s: float


class Model(BaseModel):
    """The model that this server runs; `created` is the start of the server, seconds since 1970."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "triptych"
    triptych: Defaults


class Models(BaseModel):
    """The answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class RequestObject(BaseModel):
    """One request, its progress and the URLs of its samples. Times are in seconds since 1970.

    Attributes:
        ahead: The number of requests before this one, while it is queued.
        done: The number of finished solver steps, out of `total`.
        began_at: The time at which the request left the queue.
        urls: The URLs of its images or videos, once it is done.
    """

    id: str
    object: Literal["request"] = "request"
    status: RequestStatus
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
    """The answer to `GET /v1/requests`: the newest request first."""

    object: Literal["list"] = "list"
    data: list[RequestObject]


class Health(BaseModel):
    """The answer of `/health` and `/ready`.

    Attributes:
        state: starting, ready, restarting, failed or stopping.
        reason: Why the server is not ready.
        model: The name of the model.
        ranks: The number of processes of the engine, 0 while there are none.
        queued: The number of requests in the queue.
        running: The number of requests that are running.
        restarts: The number of restarts of the ranks.
    """

    state: str
    reason: str
    model: str
    ranks: int
    queued: int
    running: int
    restarts: int
