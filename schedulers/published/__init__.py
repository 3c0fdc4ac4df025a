"""Published checkpoints: from a scheduler_config.json to a NoiseScheduler made of the parts of this package."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from schedulers.published.options import parse_options

if TYPE_CHECKING:
    from schedulers.noise_scheduler import NoiseScheduler

__all__ = ["from_diffusers"]


def from_diffusers(config: Mapping[str, object] | str | Path, even_sigmas: bool = False) -> "NoiseScheduler":
    """Return the noise scheduler of a published configuration: same grid, same steps, same noise.

    Some arguments of a diffusers class's step are not in the file (DDIM's eta, Euler's churn). They are off here;
    replace the solver to use them.

    Args:
        config: The content of diffusers' scheduler_config.json, or the path of such a file.
        even_sigmas: Whether the pipeline passes its scheduler sigmas from 1 to 1 / n, as those of FLUX, Qwen-Image and
            Z-Image do. Only a flow's sigmas change.

    Returns:
        The noise scheduler.

    Raises:
        ValueError: A class or an option is not supported. The message is one line with the reason.
    """
    from schedulers.conventions import with_even_sigmas  # not above: a launcher parses the options without torch
    from schedulers.published.classes import BUILDERS

    if not isinstance(config, Mapping):
        content = json.loads(Path(config).read_text())
        if not isinstance(content, dict):
            raise ValueError(f"{config} holds no JSON object; give a scheduler_config.json")
        config = content
    options = parse_options(config)
    found = BUILDERS[options.name](options)
    return replace(found, spacing=with_even_sigmas(found.spacing)) if even_sigmas else found
