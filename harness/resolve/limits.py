"""Limits of one request: the same for the command line, the client and the server, each refusal in one line."""

from harness.config.bounds import MAX_GUIDANCE, MAX_IMAGES, MAX_PREVIEWS, MAX_SEED, MAX_STEPS
from harness.config.engines import NATIVE
from harness.config.schema import RunConfig
from harness.config.serve import ServeConfig
from harness.messages import GenerationRequest

MAX_PROMPT_CHARS = 8_000


def check_request(request: GenerationRequest) -> None:
    """Refuse a request that no model can fulfil.

    Raises:
        ValueError: A value is out of range; the message has the key, its value and what to give instead.
    """
    for prompt in (*request.prompts, request.negative_prompt):
        if len(prompt) > MAX_PROMPT_CHARS:
            raise ValueError(f"a prompt of {len(prompt)} characters; shorten it to {MAX_PROMPT_CHARS} or fewer")
    images = len(request.prompts) * request.samples_per_prompt
    if not 1 <= images <= MAX_IMAGES:
        raise ValueError(
            f"the request asks for {images} images; prompts x samples_per_prompt must be 1 to {MAX_IMAGES}"
        )
    if request.batch_size < 1:
        raise ValueError(f"request.batch_size={request.batch_size}; give at least 1")
    if not 0 <= request.seed <= MAX_SEED:
        raise ValueError(f"request.seed={request.seed}; give 0 to {MAX_SEED}")
    if request.seeds and (
        len(request.seeds) != len(request.prompts) or not 0 <= min(request.seeds) <= max(request.seeds) <= MAX_SEED
    ):
        raise ValueError(f"seeds has {len(request.seeds)} numbers; give one from 0 to {MAX_SEED} for every prompt")
    if not 1 <= request.steps <= MAX_STEPS:
        raise ValueError(f"request.steps={request.steps}; give 1 to {MAX_STEPS}")
    if not 0 <= request.guidance <= MAX_GUIDANCE:
        raise ValueError(f"request.guidance={request.guidance}; give 0 to {MAX_GUIDANCE} (1 is no guidance)")
    if not 0 <= request.previews <= MAX_PREVIEWS:
        raise ValueError(f"previews={request.previews}; give 0 to {MAX_PREVIEWS}")
    if request.timeout_s is not None and not request.timeout_s > 0:
        raise ValueError(f"timeout_s={request.timeout_s}; give more than 0 seconds")


def check_server_limits(request: GenerationRequest, serve: ServeConfig) -> None:
    """Refuse a request that a server does not take, even if its model could fulfil it.

    Raises:
        ValueError: The request is too large; the message says what is requested and what is allowed.
    """
    images = len(request.prompts) * request.samples_per_prompt
    if images > serve.max_images:
        raise ValueError(f"the request asks for {images} images; this server takes {serve.max_images} per request")
    if request.steps > serve.max_steps:
        raise ValueError(f"the request asks for {request.steps} steps; this server takes {serve.max_steps} at most")
    apart = {"count_flops counts": request.count_flops, "profile times": request.profile}
    apart["a trace shows"] = request.trace_from_ns is not None
    if any(apart.values()) and serve.max_batch > 1:
        what = next(words for words, is_requested in apart.items() if is_requested)
        raise ValueError(f"{what} what a request does alone; set serve.max_batch=1")


def check_frames(frames: int, multiple: int, largest: int) -> None:
    """Refuse a number of frames that the VAE cannot make.

    Args:
        frames: The number of frames requested.
        multiple: Frames after the first one are a multiple of this.
        largest: The largest number of frames.

    Raises:
        ValueError: The number is impossible; the message has the nearest possible one.
    """
    if largest == 1 and frames != 1:
        raise ValueError(f"request.frames={frames}, but this model makes images; drop request.frames")
    if frames < 1 or (frames - 1) % multiple or frames > largest:
        near = 1 + min(max(round((frames - 1) / multiple), 0), (largest - 1) // multiple) * multiple
        raise ValueError(
            f"request.frames={frames}; this model makes 1 + a multiple of {multiple} frames, {largest} at most: the "
            f"nearest is {near}"
        )


def check_size(height: int, width: int, multiple: int, max_pixels: int) -> None:
    """Refuse a size that the VAE and the patches cannot make.

    Args:
        height: The height in pixels.
        width: The width in pixels.
        multiple: Pixels of which both sides are multiples.
        max_pixels: The largest height * width.

    Raises:
        ValueError: The size is impossible; the message has the nearest possible side.
    """
    for name, side in (("height", height), ("width", width)):
        if side < multiple or side % multiple:
            below = side // multiple * multiple
            near = f"{multiple}" if below < multiple else f"{below} or {below + multiple}"
            raise ValueError(
                f"request.{name}={side} is not a multiple of {multiple} pixels; "
                f"the nearest this model can make is {near}"
            )
    if height * width > max_pixels:
        raise ValueError(f"the request asks for {height} x {width} pixels; height * width may be at most {max_pixels}")


def check_largest_side(request: GenerationRequest, largest: int | None) -> None:
    """Refuse a size at which the network has no positions any more.

    Args:
        request: The request.
        largest: The largest side in pixels; None for no limit.

    Raises:
        ValueError: A side is longer.
    """
    if largest is not None and max(request.height, request.width) > largest:
        raise ValueError(
            f"the request has {request.height} x {request.width} pixels; this checkpoint has positions for {largest} "
            "per side"
        )


def no_previews(config: RunConfig) -> str:
    """Return why no previews can be made; empty if they can."""
    if config.engine.name != NATIVE:
        return f"engine={config.engine.name} shows no x0 estimate"
    return "model.offload=true takes the decoder out of memory while an image denoises" if config.model.offload else ""


def check_previews(request: GenerationRequest, reason: str) -> None:
    """Refuse previews where none can be made.

    Args:
        request: The request.
        reason: Why none can be made; empty if they can.

    Raises:
        ValueError: The request asks for previews.
    """
    if request.previews and reason:
        raise ValueError(f"{reason}; ask for no previews (partial_images=0)")
