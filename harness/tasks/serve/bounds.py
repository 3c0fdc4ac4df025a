"""The bounds of the numbers that a client sends: one table, for the check and for the OpenAPI document.

The server's configuration gives its own bounds, `harness.config.bounds` those of every server. Texts are bounded where
they are declared, in `openai.py`; sizes and frames also by what the model can make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from harness.config.bounds import MAX_GUIDANCE, MAX_PREVIEWS, MAX_SEED, MAX_SIDE, MAX_WAIT_S
from harness.config.schema import RunConfig
from harness.tasks.serve.openai import GenerationOptions, ImageRequest, JobRequest, ParsedRequest, VideoRequest
from harness.tasks.serve.problem import Problem

ANY_REQUEST = (JobRequest, ImageRequest, VideoRequest)
MAX_PARTIAL_IMAGES = 3  # OpenAI's
SCHEMAS: Mapping[str, tuple[type[BaseModel], ...]] = MappingProxyType(
    {
        **dict.fromkeys(("seed", "num_inference_steps", "guidance_scale", "true_cfg_scale"), ANY_REQUEST),
        "n": (JobRequest, ImageRequest),
        **dict.fromkeys(("output_compression", "partial_images"), (ImageRequest,)),
        **dict.fromkeys(("seconds", "num_frames", "fps", "width", "height"), (VideoRequest,)),
        "triptych": (GenerationOptions,),
    }
)
"""The schemas that have a number, by the first word of its path."""


@dataclass(frozen=True)
class NumberBound:
    """The smallest and the largest value of a number.

    Attributes:
        low: The smallest value.
        high: The largest value.
        above: Whether the value has to exceed `low`.
    """

    low: float
    high: float
    above: bool = False

    def fits(self, number: float) -> bool:
        """Return whether a number is in the bounds."""
        return (number > self.low if self.above else number >= self.low) and number <= self.high

    def __str__(self) -> str:
        """Return the bounds in words."""
        if self.low == self.high:
            return f"{self.low}"
        return f"more than {self.low:g} and at most {self.high:g}" if self.above else f"{self.low} to {self.high}"

    def as_schema(self) -> dict[str, float]:
        """Return the bounds as words of JSON schema."""
        return {"exclusiveMinimum" if self.above else "minimum": self.low, "maximum": self.high}


def number_bounds(config: RunConfig) -> dict[str, NumberBound]:
    """Return the bound of each number in a request's body, by its path.

    Args:
        config: The resolved configuration of the server.
    """
    serve, model = config.serve, config.model
    steps, seed, guidance = NumberBound(1, serve.max_steps), NumberBound(0, MAX_SEED), NumberBound(0, MAX_GUIDANCE)
    frames = NumberBound(1, model.max_frames)
    return {
        "n": NumberBound(1, serve.max_images),
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "true_cfg_scale": guidance,
        "output_compression": NumberBound(0, 100),
        "partial_images": NumberBound(0, MAX_PARTIAL_IMAGES),
        "seconds": NumberBound(0, model.max_frames / model.fps, above=True),
        "num_frames": frames,
        "fps": NumberBound(model.fps, model.fps),
        "width": NumberBound(1, MAX_SIDE),
        "height": NumberBound(1, MAX_SIDE),
        "triptych.steps": steps,
        "triptych.seed": seed,
        "triptych.guidance": guidance,
        "triptych.timeout_s": NumberBound(0, min(serve.timeout_s, MAX_WAIT_S), above=True),
        "triptych.frames": frames,
        "triptych.previews": NumberBound(0, MAX_PREVIEWS),
    }


def check_numbers(body: ParsedRequest, config: RunConfig) -> None:
    """Refuse a body with a number outside its bounds.

    Args:
        body: The validated body of the HTTP request.
        config: The resolved configuration of the server.

    Raises:
        Problem: A number is too small or too large.
    """
    sent = body.model_dump(exclude={"triptych"}) | {
        f"triptych.{name}": value for name, value in body.triptych.model_dump().items()
    }
    for path, bound in number_bounds(config).items():
        value = sent.get(path)
        if value is None or bound.fits(value):
            continue
        if path in ("triptych.frames", "num_frames") and config.model.max_frames == 1:
            continue  # this model makes images, and its refusal says so
        raise Problem("rejected", f"{path.rpartition('.')[2]}={value}; this server takes {bound}", path)


def add_bounds(document: Mapping[str, Any], config: RunConfig) -> None:
    """Write the bounds into an OpenAPI document.

    Args:
        document: The document; its schemas are changed.
        config: The resolved configuration of the server.
    """
    for path, bound in number_bounds(config).items():
        group, _, name = path.rpartition(".")
        for schema in SCHEMAS[group or name]:
            for kind in document["components"]["schemas"][schema.__name__]["properties"][name]["anyOf"]:
                if kind["type"] in ("integer", "number"):
                    kind.update(bound.as_schema())
