"""Convert a client's request body to a GenerationRequest, with every check that needs no engine."""

from __future__ import annotations

import re
import secrets
import uuid

from harness.config.schema import RunConfig
from harness.messages import GenerationRequest
from harness.resolve.limits import (
    check_frames,
    check_previews,
    check_request,
    check_server_limits,
    check_size,
    no_previews,
)
from harness.resolve.request import to_message
from harness.resolve.run import ResolvedRun
from harness.resolve.solvers import run_with_solver
from harness.tasks.serve.bounds import check_numbers
from harness.tasks.serve.image_files import ImageEncoding
from harness.tasks.serve.openai import GenerationOptions, ImageRequest, ParsedRequest, Quality, VideoRequest
from harness.tasks.serve.problem import Problem

SAME: tuple[tuple[str, str], ...] = (
    ("seed", "seed"),
    ("num_inference_steps", "steps"),
    ("guidance_scale", "guidance"),
    ("true_cfg_scale", "guidance"),
    ("negative_prompt", "negative_prompt"),
    ("num_frames", "frames"),
)
"""Names at the top level of a body, as other servers have them, and the option of `triptych` that is the same."""
DEFAULT_PREVIEWS = 4
NO_MODEL = "default"  # the model of SGLang's and vllm-omni's load generators, if their user names none
SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
MAX_RANDOM_SEED = 2**31


def to_request(body: ParsedRequest, n: int, frames: int | None, config: RunConfig) -> GenerationRequest:
    """Convert a parsed body to the message for the engine; its n samples share forwards.

    Args:
        body: The validated body of the HTTP request.
        n: The number of images or videos.
        frames: The number of frames of each sample; None means the body's, or the server's own `request.frames`.
        config: The resolved configuration of the server.

    Returns:
        The request, with a new id and every default filled in.

    Raises:
        Problem: The server or its model cannot generate this; the message says what to request instead.
    """
    own = to_message(config.request)
    check_numbers(body, config)
    options = parse_options(body, config)
    _check_model_and_scheduler(body, options, config)
    width, height = _parse_size(_size_of(body), own)
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
        frames=next(number for number in (frames, options.frames, own.frames) if number is not None),
        timeout_s=config.serve.timeout_s if options.timeout_s is None else options.timeout_s,
        solver=options.solver or "",
        previews=_previews(body, options),
    )
    _check_bounds(request, config)
    if request.solver:
        _check_solver(request, config)
    return request


def _check_solver(request: GenerationRequest, config: RunConfig) -> None:
    try:
        run_with_solver(ResolvedRun(config), request.solver, request.steps)
    except ValueError as error:
        raise Problem("rejected", str(error), "triptych.solver") from error


def parse_options(body: ParsedRequest, config: RunConfig) -> GenerationOptions:
    """Merge the options of a body: those of `triptych`, and the same ones under other servers' names.

    Args:
        body: The validated body of the HTTP request.
        config: The resolved configuration of the server.

    Returns:
        All options, by this project's names.

    Raises:
        Problem: Two fields say different things of one option, or the network cannot use one.
    """
    sent, options = body.model_dump(), body.triptych.model_dump()
    scale = sent["true_cfg_scale"]
    if scale is not None and ResolvedRun(config).shape.embedded and sent.pop("true_cfg_scale") != 1:
        line = f"true_cfg_scale={scale:g}, but {config.model.name} takes the scale as an input; give guidance_scale"
        raise Problem("rejected", line, "true_cfg_scale")
    names = {name: f"triptych.{name}" for name, value in options.items() if value is not None}
    for name, option in SAME:
        value = sent.get(name)
        if value is None:
            continue
        if options[option] not in (None, value):
            raise Problem("rejected", _contradiction(name, value, names[option], options[option]), name)
        options[option], names[option] = value, name
    steps = _steps_of_quality(body, config)
    if steps is not None:
        if options["steps"] not in (None, steps):
            quality = f"quality={sent['quality']} means {steps} steps"
            line = f"{quality}, and {names['steps']}={options['steps']} was given; give one of them"
            raise Problem("rejected", line, "quality")
        options["steps"] = steps
    return GenerationOptions(**options)


def _contradiction(name: str, value: object, other: str, other_value: object) -> str:
    shown = [f"{field}={str(said)[:60]}" for field, said in ((name, value), (other, other_value))]
    return f"{shown[0]} and {shown[1]} are two values of one thing; give one of them"


def quality_of(body: ImageRequest) -> Quality | None:
    """Return the quality that a body asks for; None for the server's own."""
    names: dict[str | None, Quality] = {"low": "low", "medium": "medium", "high": "high", "hd": "high"}
    return names.get(body.quality)


def _steps_of_quality(body: ParsedRequest, config: RunConfig) -> int | None:
    """Return the steps that a body's quality means: half of the server's own, its own, or twice as many."""
    quality = quality_of(body) if isinstance(body, ImageRequest) else None
    if quality is None:
        return None
    own = to_message(config.request).steps
    return {"low": max(1, own // 2), "medium": own, "high": min(2 * own, config.serve.max_steps)}[quality]


def _previews(body: ParsedRequest, options: GenerationOptions) -> int:
    """Return the number of previews that a body asks for."""
    previews = DEFAULT_PREVIEWS if options.previews is True else int(options.previews or 0)
    partial = body.partial_images if isinstance(body, ImageRequest) else None
    if partial is not None and options.previews is not None and partial != previews:
        line = _contradiction("partial_images", partial, "triptych.previews", options.previews)
        raise Problem("rejected", line, "partial_images")
    return previews if partial is None else partial


def parse_encoding(body: ImageRequest) -> ImageEncoding:
    """Return how the images of a request are written, and refuse what the answer cannot have.

    Args:
        body: The validated body of the HTTP request.

    Returns:
        The format and the quality.

    Raises:
        Problem: Two fields exclude one another, or there is no such image here.
    """
    if body.background == "transparent":
        raise Problem(
            "rejected", "background=transparent, but no model here makes transparent images; use opaque", "background"
        )
    if body.stream and body.response_format == "url":
        raise Problem("rejected", "a stream has images in base64; leave response_format=url out", "response_format")
    if body.partial_images and not body.stream:
        raise Problem("rejected", "partial_images come in a stream; add stream=true", "partial_images")
    name, quality = body.output_format or "png", body.output_compression
    if quality is not None and name == "png":
        raise Problem(
            "rejected", "output_compression is for jpeg and webp; PNG files are lossless", "output_compression"
        )
    return ImageEncoding(name, 100 if quality is None else quality)


def _size_of(body: ParsedRequest) -> str | None:
    """Return a body's size, which videos may give as width and height."""
    if not isinstance(body, VideoRequest) or body.width is body.height is None:
        return body.size
    if body.width is None or body.height is None:
        raise Problem("rejected", "give width and height, or size=WIDTHxHEIGHT", "width")
    size = f"{body.width}x{body.height}"
    if body.size not in (None, size):
        raise Problem("rejected", f"size={body.size} and width x height = {size} differ; give one of them", "size")
    return size


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
    check_numbers(body, config)
    model, seconds, frames = config.model, body.seconds, parse_options(body, config).frames
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
    if body.model not in (None, NO_MODEL, name, config.model.path, config.model.hub):
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
        check_previews(request, no_previews(config))
    except ValueError as error:
        raise Problem("rejected", str(error).replace("request.", "")) from error
