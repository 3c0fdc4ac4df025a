"""From a client's body to a GenerationRequest, with every check that needs no engine made before one is asked."""

from __future__ import annotations

import re
import secrets
import uuid

from harness.config.schema import RunConfig
from harness.messages import GenerationRequest
from harness.resolve.limits import check_frames, check_request, check_served, check_size
from harness.resolve.request import to_message
from harness.tasks.serve.openai import Asked, Settings, VideoRequest
from harness.tasks.serve.problem import Problem

SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
MAX_DRAWN_SEED = 2**31


def to_request(asked: Asked, n: int, frames: int | None, config: RunConfig) -> GenerationRequest:
    """The request that an engine takes; its n pictures share forwards.

    Args:
        asked: a body.
        n: pictures or videos.
        frames: of each; None is the server's own `request.frames`.
        config: of the server, resolved.

    Raises:
        Problem: what the server or its model cannot draw, with what to ask for instead.
    """
    own, settings = to_message(config.request), asked.triptych
    _check_names(asked, settings, config)
    width, height = _size(asked.size, own)
    request = GenerationRequest(
        request_id=uuid.uuid4().hex,
        prompts=[asked.prompt],
        steps=own.steps if settings.steps is None else settings.steps,
        guidance=own.guidance if settings.guidance is None else settings.guidance,
        height=height,
        width=width,
        negative_prompt=own.negative_prompt if settings.negative_prompt is None else settings.negative_prompt,
        seed=secrets.randbelow(MAX_DRAWN_SEED) if settings.seed is None else settings.seed,
        samples_per_prompt=n,
        batch_size=n,
        frames=own.frames if frames is None else frames,
        timeout_s=config.serve.timeout_s if settings.timeout_s is None else settings.timeout_s,
    )
    _check_bounds(request, config)
    return request


def frames_of(asked: VideoRequest, config: RunConfig) -> int:
    """The frames of a video: those asked for, the nearest number to its seconds, or the server's own.

    Raises:
        Problem: both are given, or the model draws pictures, or a picture is asked for.
    """
    model, seconds, frames = config.model, asked.seconds, asked.triptych.frames
    if model.max_frames == 1:
        raise Problem("rejected", f"{model.name} draws pictures; post to /v1/images/generations", "model")
    if seconds is not None and frames is not None:
        raise Problem("rejected", "give seconds or triptych.frames, not both", "seconds")
    if seconds is not None:
        if not 0 < seconds * model.fps <= model.max_frames:
            longest = model.max_frames / model.fps
            raise Problem("rejected", f"seconds={seconds:g}; ask for more than 0 and at most {longest:g}", "seconds")
        return 1 + max(1, round((seconds * model.fps - 1) / model.frame_multiple)) * model.frame_multiple
    frames = to_message(config.request).frames if frames is None else frames
    if frames == 1:
        raise Problem("rejected", "frames=1 is a picture; post to /v1/images/generations", "triptych.frames")
    return frames


def _check_names(asked: Asked, settings: Settings, config: RunConfig) -> None:
    name, family = config.model.name, config.scheduler.family
    if asked.model not in (None, name):
        raise Problem("model_not_found", f"model={asked.model} does not run here; ask for {name}", "model")
    if settings.scheduler not in (None, family):
        raise Problem(
            "rejected",
            f"scheduler={settings.scheduler} does not run here; this server's noise scheduler is {family}",
            "triptych.scheduler",
        )


def _size(size: str | None, own: GenerationRequest) -> tuple[int, int]:
    """Width and height, pixels."""
    if size in (None, "auto"):
        return own.width, own.height
    found = SIZE.fullmatch(size or "")
    if found is None:
        example = f"{own.width}x{own.height}"
        raise Problem("rejected", f"size={size}; give WIDTHxHEIGHT in pixels, such as {example}, or auto", "size")
    return int(found[1]), int(found[2])


def _check_bounds(request: GenerationRequest, config: RunConfig) -> None:
    serve, model = config.serve, config.model
    if not 1 <= request.samples_per_prompt <= serve.max_pictures:
        said = f"n={request.samples_per_prompt}; this server takes 1 to {serve.max_pictures}"
        raise Problem("rejected", said, "n")
    if request.timeout_s is None or not 0 < request.timeout_s <= serve.timeout_s:
        said = f"timeout_s={request.timeout_s}; give more than 0 and at most {serve.timeout_s:g} seconds"
        raise Problem("rejected", said, "triptych.timeout_s")
    try:
        check_request(request)
        check_served(request, serve)
        check_frames(request.frames, model.frame_multiple, model.max_frames)
        check_size(request.height, request.width, model.size_multiple, model.max_pixels)
    except ValueError as error:
        raise Problem("rejected", str(error).replace("request.", "")) from error
