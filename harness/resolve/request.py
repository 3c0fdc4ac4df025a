"""The `request` group as the message that an engine takes."""

from __future__ import annotations

import uuid

from harness.config.schema import RequestConfig
from harness.messages import GenerationRequest


def to_message(request: RequestConfig) -> GenerationRequest:
    """Convert a resolved `request` group to the message that an engine takes.

    Args:
        request: The `request` group, resolved against a model.

    Returns:
        The request with an id of its own.

    Raises:
        ValueError: The group was not resolved against a model.
    """
    prompts, steps, guidance, height, width = (
        request.prompts,
        request.steps,
        request.guidance,
        request.height,
        request.width,
    )
    negative, frames = request.negative_prompt, request.frames
    if prompts is None or steps is None or guidance is None or height is None or width is None:
        raise ValueError("the request was not resolved; compose it with harness.resolve.compose.compose_run")
    if negative is None or frames is None:
        raise ValueError("the request was not resolved; compose it with harness.resolve.compose.compose_run")
    return GenerationRequest(
        request_id=uuid.uuid4().hex,
        prompts=list(prompts),
        steps=steps,
        guidance=guidance,
        height=height,
        width=width,
        negative_prompt=negative,
        seed=request.seed,
        samples_per_prompt=request.samples_per_prompt,
        batch_size=request.batch_size,
        frames=frames,
    )
