"""The bodies of OpenAI's API for images and videos, with this project's own fields in one object, `triptych`.

SGLang's and vllm-omni's names are accepted at the top level. Fields of OpenAI's API that have no effect here are
accepted only with the value that means so. `bounds.py` has the bounds of the numbers.
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
Quality: TypeAlias = Literal["low", "medium", "high"]
ImageFormat: TypeAlias = Literal["png", "jpeg", "webp"]
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
        solver: The solver, one of the server's `solvers`; its options have their defaults.
        previews: The number of previews of the first image while it denoises; true means 4.
    """

    steps: int | None = None
    seed: int | None = None
    guidance: FiniteFloat | None = None
    negative_prompt: Prompt | None = None
    timeout_s: FiniteFloat | None = None
    frames: int | None = None
    scheduler: Label | None = None
    solver: Label | None = None
    previews: bool | int | None = None


class ParsedRequest(BaseModel, extra="forbid"):
    """The fields that every request has.

    Attributes:
        prompt: The text to generate from.
        model: The name of the model, if the client gives one.
        size: WIDTHxHEIGHT in pixels; null or auto means the server's own size.
        user: The client's name for its user.
        seed: The same as `triptych.seed`.
        num_inference_steps: The same as `triptych.steps`.
        guidance_scale: The same as `triptych.guidance`.
        true_cfg_scale: The same as `triptych.guidance`, for a network that does not take the scale as an input.
        negative_prompt: The same as `triptych.negative_prompt`.
        triptych: This project's own options.
    """

    prompt: Prompt
    model: Label | None = None
    size: Size | None = None
    user: Label | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: FiniteFloat | None = None
    true_cfg_scale: FiniteFloat | None = None
    negative_prompt: Prompt | None = None
    triptych: GenerationOptions = GenerationOptions()


class JobRequest(ParsedRequest):
    """The body of `POST /v1/requests`: n images or videos, generated in the background."""

    n: int | None = None


class ImageRequest(JobRequest):
    """The body of `POST /v1/images/generations`.

    Attributes:
        response_format: Images in base64, or their URLs.
        output_format: The format of the images.
        output_compression: The quality of JPEG and WebP, percent.
        quality: The number of steps: half of the server's own, its own, or twice as many.
        background: auto and opaque mean the same; no model here makes transparent images.
        moderation: Nothing is moderated.
        stream: Whether the answer is a stream of server-sent events.
        partial_images: The number of previews in the stream, before the image.
        safety_identifier: The client's name for its user; `user` is the older name.
    """

    response_format: Literal["b64_json", "url"] | None = None
    output_format: ImageFormat | None = None
    output_compression: int | None = None
    quality: Literal["auto", "standard", "hd"] | Quality | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: bool | None = None
    partial_images: int | None = None
    safety_identifier: Label | None = None


class VideoRequest(ParsedRequest):
    """The body of `POST /v1/videos`.

    Attributes:
        seconds: The length, rounded to the nearest number of frames that the model supports.
        num_frames: The same as `triptych.frames`.
        fps: The frames per second; those of the model alone are accepted.
        width: The width in pixels, in place of `size`.
        height: The height in pixels, in place of `size`.
    """

    seconds: FiniteFloat | None = None
    num_frames: int | None = None
    fps: int | None = None
    width: int | None = None
    height: int | None = None


class ImageData(BaseModel):
    """One image: its file in base64, or its URL."""

    b64_json: str | None = None
    url: str | None = None


class GenerationInfo(BaseModel):
    """The object `triptych` of an answer.

    Attributes:
        request_id: The id of the request, for `/v1/requests`.
        seed: The seed of the first image.
        solver: The solver.
        steps: The number of solver steps.
        guidance: The scale of classifier-free guidance.
        queued_ms: The time in the queue, ms.
        total_ms: The time from arrival to the engine's answer, ms.
    """

    request_id: str
    seed: int
    solver: str
    steps: int
    guidance: float
    queued_ms: float
    total_ms: float


class ImagesResponse(BaseModel):
    """The answer to `POST /v1/images/generations`."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    quality: Quality | None
    size: str
    triptych: GenerationInfo


class ImageEvent(BaseModel):
    """What both events of a stream of images say.

    Attributes:
        b64_json: The image in base64; a partial image is a small preview.
        created_at: The time of the event, seconds since 1970.
        size: The size of the image that was requested.
    """

    b64_json: str
    background: Literal["opaque"] = "opaque"
    created_at: int
    output_format: ImageFormat
    quality: Quality | Literal["auto"]
    size: str


class PartialImageEvent(ImageEvent):
    """A preview of the first image, the solver's estimate on the way."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int


class TokenDetails(BaseModel):
    """Tokens by kind: none are counted."""

    image_tokens: int = 0
    text_tokens: int = 0


class TokenUsage(BaseModel):
    """The tokens of an image, which OpenAI's clients expect: none are counted."""

    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class CompletedEvent(ImageEvent):
    """One of the images that a stream was opened for."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: TokenUsage = TokenUsage()
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
    solvers: list[str]
    steps: int
    guidance: float
    negative_prompt: str
    size: str
    frames: int
    fps: int
    size_multiple: int
    max_pixels: int
    max_steps: int
    max_images: int
    max_frames: int
    max_previews: int
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
        stage: The stage of the pipeline.
        done: The number of finished solver steps, out of `total`.
        stage_done: The number of finished parts of the stage, out of `stage_total`: solver steps while it denoises,
            images while it decodes several batches of them. Both are 0 in other stages.
        elapsed_s: The seconds from its arrival until now, or until it was answered.
        previews: The number of previews that it asked for.
        began_at: The time at which the request left the queue.
        urls: The URLs of its images or videos, once it is done.
        preview: A PNG in base64 of the first image on the way, if previews were asked for. A stream of events has each
            once, a list of requests has none.
    """

    id: str
    object: Literal["request"] = "request"
    status: RequestStatus
    stage: str
    ahead: int
    done: int
    total: int
    stage_done: int
    stage_total: int
    elapsed_s: float
    prompt: str
    negative_prompt: str
    n: int
    steps: int
    seed: int
    guidance: float
    solver: str
    previews: int
    size: str
    frames: int
    created_at: float
    began_at: float | None
    completed_at: float | None
    urls: list[str]
    preview: str | None = None
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
