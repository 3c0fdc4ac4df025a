"""Published checkpoints: from a scheduler_config.json to a NoiseScheduler made of the parts of this package.

`check_published` needs no torch, so that a launcher can refuse a file, or a number of steps, before a process starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from schedulers.published.limits import check_steps
from schedulers.published.options import parse_options
from schedulers.published.refusals import check_options

if TYPE_CHECKING:
    from schedulers.noise_scheduler import NoiseScheduler

__all__ = ["check_published", "from_diffusers"]


def check_published(config: Mapping[str, object], steps: int | None = None) -> None:
    """Refuse a published configuration, or a number of steps, that cannot run.

    Args:
        config: The content of diffusers' scheduler_config.json.
        steps: The number of steps, if known.

    Raises:
        ValueError: A class or an option is not supported, or the timesteps do not suffice. The message is one line.
    """
    options = parse_options(config)
    check_options(options)
    if steps is not None:
        check_steps(options, steps)


def from_diffusers(config: Mapping[str, object] | str | Path, even_sigmas: bool = False) -> NoiseScheduler:
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
    from schedulers.conventions import with_even_sigmas  # these import torch
    from schedulers.published.classes import BUILDERS

    if not isinstance(config, Mapping):
        content = json.loads(Path(config).read_text())
        if not isinstance(content, dict):
            raise ValueError(f"{config} holds no JSON object; give a scheduler_config.json")
        config = content
    options = parse_options(config)
    check_options(options)
    found = BUILDERS[options.name](options)
    return replace(found, spacing=with_even_sigmas(found.spacing)) if even_sigmas else found
