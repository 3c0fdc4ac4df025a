"""The model shape that a layout has to fit, for a configuration's network and each request; without torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from harness.config.schema import ModelConfig, RunConfig
from harness.messages import GenerationRequest
from harness.resolve.layout_rules import ModelShape
from harness.resolve.request import to_message
from models.files import read_json
from models.registry import ARCHITECTURES


def model_shape(config: RunConfig, denoiser: Path) -> ModelShape:
    """Return the model shape for a configuration's own request.

    Heads and blocks come from the denoiser's config.json, tokens and guidance from the request.

    Args:
        config: The resolved configuration.
        denoiser: The folder of the denoiser's config.json.

    Returns:
        What a layout has to fit.
    """
    model = config.model
    network = read_json(denoiser / "config.json")
    row = ARCHITECTURES[model.architecture]
    heads, depth = network.get(row.heads or ""), network.get(row.depth)
    shape = ModelShape(
        model=model.name,
        heads=heads if isinstance(heads, int) else None,
        depth=depth if isinstance(depth, int) else 0,
        tokens=0,
        rows=0,
        frames=0,
        guidance=1.0,
        embedded=network.get("guidance_embeds") is True,
    )
    return shape_for_request(shape, model, to_message(config.request))


def shape_for_request(shape: ModelShape, model: ModelConfig, request: GenerationRequest) -> ModelShape:
    """Return the shape of the same network for another request."""
    frames = (request.frames - 1) // model.frame_multiple + 1
    rows, columns = request.height // model.size_multiple, request.width // model.size_multiple
    return replace(shape, tokens=frames * rows * columns, rows=rows, frames=frames, guidance=request.guidance)
