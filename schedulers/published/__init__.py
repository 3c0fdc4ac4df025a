"""Published checkpoints: from a scheduler_config.json to a NoiseScheduler made of the parts of this package."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from schedulers.conventions import with_even_sigmas
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.published.classes import BUILDERS
from schedulers.published.options import parse_options

__all__ = ["from_diffusers"]


def from_diffusers(config: Mapping[str, object] | str | Path, even_sigmas: bool = False) -> NoiseScheduler:
    """The noise scheduler that a published configuration asks for: same grid, same steps, same noise.

    config is the content of diffusers' scheduler_config.json, or the path of such a file. What a diffusers class takes
    as an argument of its step (DDIM's eta, Euler's churn) is not in the file and is off; replace the solver to have it.
    even_sigmas: the pipeline hands its scheduler sigmas from 1 to 1 / n, as those of FLUX, Qwen-Image and Z-Image do; a
    flow's only.
    Raises ValueError, in one line, for a class or an option that cannot be honoured, with the reason.
    """
    if not isinstance(config, Mapping):
        content = json.loads(Path(config).read_text())
        if not isinstance(content, dict):
            raise ValueError(f"{config} holds no JSON object; give a scheduler_config.json")
        config = content
    options = parse_options(config)
    found = BUILDERS[options.name](options)
    return replace(found, spacing=with_even_sigmas(found.spacing)) if even_sigmas else found
