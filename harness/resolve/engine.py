"""Whether the chosen engine can run a configuration; checked before a process starts, without torch."""

from __future__ import annotations

import math
import warnings

from harness.config.schema import BlockCacheConfig, RunConfig
from harness.config.tasks import TRAITS
from harness.parallel.mesh import degrees
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY
from harness.resolve.engines_table import (
    BASELINES,
    CACHE_DIT,
    NATIVE,
    SGLANG,
    baseline_attention,
    refuse_unknown_engine,
)

LEARNED = ("learned", "learned_range")


def check_engine(config: RunConfig) -> None:
    """Refuse what the engine cannot run, and warn of keys that have no effect in it.

    Raises:
        ValueError: The engine cannot run this; one line says what to change.
    """
    name = config.engine.name
    refuse_unknown_engine(name)
    if name != CACHE_DIT and config.engine.cache != BlockCacheConfig():
        warnings.warn(f"engine.cache has no effect with engine={name}", stacklevel=2)
    if name == NATIVE:
        return
    if not TRAITS[config.task.name].uses_checkpoint:
        raise ValueError(f"engine={name} has no effect on task={config.task.name.name}; drop it")
    architecture = config.model.architecture
    supported = [key for key, row in BASELINES.items() if name != SGLANG or row.sglang is not None]
    if architecture not in supported:
        raise ValueError(
            f"engine={name} does not run architecture {architecture}; it runs {', '.join(supported)}: use engine=native"
        )
    if (ranks := math.prod(degrees(config.parallel))) > 1:
        raise ValueError(f"engine={name} runs one rank, the layout has {ranks}; use parallel=single")
    if config.task.fidelity_per_step:
        raise ValueError(
            f"task.fidelity_per_step reads the state after every step, which engine={name} does not provide; drop it"
        )
    baseline_attention(config)
    _check_noise_scheduler(config)
    _check_request(config)
    if name == CACHE_DIT:
        _check_cache(config)
    if not config.model.text.keep_loaded:
        warnings.warn(f"model.text.keep_loaded=false has no effect with engine={name}", stacklevel=2)


def _check_noise_scheduler(config: RunConfig) -> None:
    name, family, solver = config.model.name, config.scheduler.family, config.scheduler.solver
    fitting = BASELINES[config.model.architecture].families
    if fitting is not None and family not in fitting:
        raise ValueError(
            f"scheduler={family} does not fit diffusers' pipeline of model={name}, which does not scale what it feeds "
            f"its network; choose scheduler={' or scheduler='.join(fitting)}, or engine=native"
        )
    if family != PUBLISHED_FAMILY and solver.name == "rk45":
        raise ValueError(
            "scheduler/solver=rk45 chooses its timesteps by the image, and diffusers needs them in advance; choose "
            "another solver, or engine=native"
        )
    if family != PUBLISHED_FAMILY and solver.variance in LEARNED:
        raise ValueError(
            f"scheduler.solver.variance={solver.variance}: diffusers' pipeline of model={name} drops the learned "
            "variance; choose small or large, or engine=native"
        )


def _check_request(config: RunConfig) -> None:
    guidance, negative = config.request.guidance, config.request.negative_prompt
    if guidance is not None and config.model.architecture != "flux":
        refuse_weak_guidance(guidance)
    if config.model.architecture == "dit":
        refuse_negative_class(negative or "")


def _check_cache(config: RunConfig) -> None:
    if not BASELINES[config.model.architecture].cacheable:
        raise ValueError(
            f"engine={CACHE_DIT} skips blocks of transformers, and model={config.model.name} has a U-Net; use "
            "engine=diffusers"
        )
    cache = config.engine.cache
    if cache.first_blocks < 1 or cache.warmup < 1:
        raise ValueError(
            f"engine.cache.first_blocks={cache.first_blocks}, engine.cache.warmup={cache.warmup}; give at least 1"
        )
    if not cache.threshold > 0:
        raise ValueError(
            f"engine.cache.threshold={cache.threshold} skips nothing; give more than 0, or use engine=diffusers"
        )


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
