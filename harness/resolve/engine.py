"""Whether the chosen engine can run a configuration; checked before a process starts, without torch."""

from __future__ import annotations

import warnings
from pathlib import Path

from harness.config.engines import CACHE_DIT, ENGINES, NATIVE, ON_DIFFUSERS
from harness.config.optimize import Optimize
from harness.config.schema import BlockCacheConfig, RunConfig
from harness.resolve.engines_table import BASELINES, baseline_attention
from models.files import read_json
from models.registry import ARCHITECTURES
from schedulers.compatibility import scales_state
from schedulers.settings import NoiseSchedulerSettings


def check_engine(config: RunConfig) -> None:
    """Refuse what the engine cannot run, and warn of keys that have no effect in it.

    Raises:
        ValueError: The engine cannot run this; one line says what to change.
    """
    name = config.engine.name
    if name != CACHE_DIT and config.engine.cache != BlockCacheConfig():
        warnings.warn(f"engine.cache has no effect with engine={name}", stacklevel=2)
    if name == NATIVE:
        return
    baseline_attention(config)
    if not config.model.text.keep_loaded:
        warnings.warn(f"model.text.keep_loaded=false has no effect with engine={name}", stacklevel=2)
    if name not in ON_DIFFUSERS:
        _check_other(config)
        return
    _check_noise_scheduler(config)
    _check_request(config)


def _check_other(config: RunConfig) -> None:
    """Refuse what an engine of a plug-in does not declare."""
    name, known = config.engine.name, ENGINES[config.engine.name].architectures
    if known is not None and config.model.architecture not in known:
        raise ValueError(
            f"engine={name} runs {', '.join(known)}, and model={config.model.name} is {config.model.architecture}; use "
            "engine=native"
        )
    if config.engine.optimize is Optimize.compile:
        raise ValueError(f"engine.optimize=compile has no effect on engine={name}; use engine.optimize=none")


def _check_noise_scheduler(config: RunConfig) -> None:
    name, family = config.model.name, config.scheduler.family
    fitting = BASELINES[config.model.architecture].families
    if fitting is not None and family not in fitting:
        raise ValueError(
            f"scheduler={family} does not fit diffusers' pipeline of model={name}, which does not scale what it feeds "
            f"its network; choose scheduler={' or scheduler='.join(fitting)}, or engine=native"
        )


def check_first_blocks(config: RunConfig, denoiser: Path) -> None:
    """Refuse a block cache that computes all blocks of the network.

    Args:
        config: The configuration, whose engine is cache_dit.
        denoiser: The folder of the denoiser's config.json.

    Raises:
        ValueError: One line says how many blocks it may compute.
    """
    network, first = read_json(denoiser / "config.json"), config.engine.cache.first_blocks
    keys = (ARCHITECTURES[config.model.architecture].depth, "num_single_layers")
    depth = sum(count for count in map(network.get, keys) if isinstance(count, int))
    if first >= depth > 0:
        raise ValueError(
            f"engine.cache.first_blocks={first} leaves nothing to skip in a network of {depth} blocks; give at most "
            f"{depth - 1}"
        )


def check_baseline_settings(config: RunConfig, settings: NoiseSchedulerSettings) -> None:
    """Refuse a noise scheduler that diffusers' pipeline cannot follow.

    Args:
        config: The configuration, whose engine is diffusers or on it.
        settings: The complete settings of its noise scheduler.

    Raises:
        ValueError: One line says what to change.
    """
    if settings.state_dtype is not None:
        raise ValueError(
            f"scheduler.state_dtype={settings.state_dtype} has no effect in diffusers' pipelines; drop it, or use "
            "engine=native"
        )
    if BASELINES[config.model.architecture].families is not None and scales_state(settings):
        raise ValueError(
            f"diffusers' pipeline of model={config.model.name} scales neither noise nor network input, and "
            f"scheduler.path={settings.path} begins at another sigma than 1; drop what lowers the first sigma and "
            "scheduler.coordinates, or use engine=native"
        )


def _check_request(config: RunConfig) -> None:
    guidance, negative = config.request.guidance, config.request.negative_prompt
    if guidance is not None and config.model.architecture != "flux":
        refuse_weak_guidance(guidance)
    if config.model.architecture == "dit":
        refuse_negative_class(negative or "")


def refuse_weak_guidance(guidance: float) -> None:
    """Refuse a guidance scale below 1, at which a pipeline of diffusers does not guide.

    Raises:
        ValueError: The scale is below 1; the message says what to give instead.
    """
    if guidance < 1:
        raise ValueError(
            f"request.guidance={guidance}: diffusers guides above 1 only; give at least 1, or use engine=native"
        )


def refuse_negative_class(negative: str) -> None:
    """Refuse a negative prompt for DiTPipeline.

    Raises:
        ValueError: There is a negative prompt; the message says what to do instead.
    """
    if negative:
        raise ValueError(
            f"request.negative_prompt={negative!r}: diffusers' DiTPipeline has no negative class; drop it, or use "
            "engine=native"
        )
