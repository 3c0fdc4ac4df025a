"""Convert a client's request body to a GenerationRequest, with every check that needs no engine."""

from __future__ import annotations

import re
import secrets
import uuid

from harness.config.schema import RunConfig
from harness.messages import GenerationRequest
from harness.resolve.limits import check_frames, check_request, check_server_limits, check_size
from harness.resolve.request import to_message
from harness.tasks.serve.bounds import check_numbers
from harness.tasks.serve.openai import GenerationOptions, ParsedRequest, VideoRequest
from harness.tasks.serve.problem import Problem

SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
MAX_RANDOM_SEED = 2**31


def to_request(body: ParsedRequest, n: int, frames: int | None, config: RunConfig) -> GenerationRequest:
    """Convert a parsed body to the message for the engine; its n samples share forwards.

    Args:
        body: The validated body of the HTTP request.
        n: The number of images or videos.
        frames: The number of frames of each sample; None means the server's own `request.frames`.
        config: The resolved configuration of the server.

    Returns:
        The request, with a new id and every default filled in.

    Raises:
        Problem: The server or its model cannot generate this; the message says what to request instead.
    """
    own, options = to_message(config.request), body.triptych
    _check_model_and_scheduler(body, options, config)
    check_numbers(body, config)
    width, height = _parse_size(body.size, own)
    request = GenerationRequest(
        request_id=uuid.uuid4().hex,
        prompts=[body.prompt],
        steps=own.steps if options.steps is None else options.steps,
        guidance=own.guidance if options.guidance is None else options.guidance,
        height=height,
        width=width,
        negative_prompt=own.negative_prompt if options.negative_prompt is None else options.negative_prompt,
        seed=secrets.randbelow(MAX_RANDOM_SEED) if options.seed is None else options.seed,
        samples_per_prompt=n,
        batch_size=n,
        frames=own.frames if frames is None else frames,
        timeout_s=config.serve.timeout_s if options.timeout_s is None else options.timeout_s,
    )
    _check_bounds(request, config)
    return request


def video_frames(body: VideoRequest, config: RunConfig) -> int:
    """Choose the number of frames of a video.

    Args:
        body: The validated body of the HTTP request.
        config: The resolved configuration of the server.

    Returns:
        The requested frames, the valid number nearest to the requested seconds, or the server's own frames.

    Raises:
        Problem: Both seconds and frames are given, the model generates images only, or the result is an image.
    """
    model, seconds, frames = config.model, body.seconds, body.triptych.frames
    if model.max_frames == 1:
        raise Problem("rejected", f"{model.name} generates images; post to /v1/images/generations", "model")
    if seconds is not None and frames is not None:
        raise Problem("rejected", "give seconds or triptych.frames, not both", "seconds")
    if seconds is not None:
        if not 0 < seconds * model.fps <= model.max_frames:
            longest = model.max_frames / model.fps
            raise Problem("rejected", f"seconds={seconds:g}; give more than 0 and at most {longest:g}", "seconds")
        return 1 + max(1, round((seconds * model.fps - 1) / model.frame_multiple)) * model.frame_multiple
    frames = to_message(config.request).frames if frames is None else frames
    if frames == 1:
        raise Problem("rejected", "frames=1 is an image; post to /v1/images/generations", "triptych.frames")
    return frames


def _check_model_and_scheduler(body: ParsedRequest, options: GenerationOptions, config: RunConfig) -> None:
    name, family = config.model.name, config.scheduler.family
    if body.model not in (None, name):
        raise Problem("model_not_found", f"model={body.model} is not served here; use model={name}", "model")
    if options.scheduler not in (None, family):
        raise Problem(
            "rejected",
            f"scheduler={options.scheduler} is not served here; this server's noise scheduler is {family}",
            "triptych.scheduler",
        )


def _parse_size(size: str | None, own: GenerationRequest) -> tuple[int, int]:
    """Return width and height in pixels."""
    if size in (None, "auto"):
        return own.width, own.height
    found = SIZE.fullmatch(size or "")
    if found is None:
        example = f"{own.width}x{own.height}"
        raise Problem("rejected", f"size={size}; give WIDTHxHEIGHT in pixels, such as {example}, or auto", "size")
    return int(found[1]), int(found[2])


def _check_bounds(request: GenerationRequest, config: RunConfig) -> None:
    serve, model = config.serve, config.model
    try:
        check_request(request)
        check_server_limits(request, serve)
        check_frames(request.frames, model.frame_multiple, model.max_frames)
        check_size(request.height, request.width, model.size_multiple, model.max_pixels)
    except ValueError as error:
        raise Problem("rejected", str(error).replace("request.", "")) from error
