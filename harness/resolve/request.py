"""The `request` group as the message that an engine takes."""

from __future__ import annotations

import uuid

from harness.config.schema import RequestConfig
from harness.messages import GenerationRequest


def to_message(asked: RequestConfig) -> GenerationRequest:
    """A resolved `request` group as the message that the engine takes.

    Raises:
        ValueError: a group that was not resolved against a model.
    """
    prompts, steps, guidance, height, width = asked.prompts, asked.steps, asked.guidance, asked.height, asked.width
    negative, frames = asked.negative_prompt, asked.frames
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
        seed=asked.seed,
        samples_per_prompt=asked.samples_per_prompt,
        batch_size=asked.batch_size,
        frames=frames,
    )
