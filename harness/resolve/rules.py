"""The rules of a configuration: the model fills null keys, and combinations that cannot run are refused."""

from __future__ import annotations

import warnings
from operator import attrgetter
from pathlib import Path

import msgspec

from harness.config.cache import NONE as NO_CACHE
from harness.config.cache import check_cache
from harness.config.optimize import Optimize
from harness.config.schema import CheckpointDefaults, LaunchMode, Load, ParallelConfig, RunConfig
from harness.config.tasks import KEYS_OF_TASKS, TRAITS
from harness.metrics import pretrained
from harness.parallel.mesh import AXES, degrees, world_size
from harness.records.media import ffmpeg
from harness.resolve.checkpoint import check_checkpoint, locate
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY, apply_training_facts, denoiser_defaults
from harness.resolve.engine import check_engine
from harness.resolve.engines_table import NATIVE
from harness.resolve.layout import model_shape
from harness.resolve.layout_rules import check_layout, is_approximate
from harness.resolve.limits import check_frames, check_request, check_size
from harness.resolve.optimize import resolve_optimize
from harness.resolve.published_scheduler import check_published_scheduler
from harness.resolve.quantize import check_quantize
from harness.resolve.request import to_message
from harness.resolve.scheduler import noise_scheduler_settings
from models.registry import ARCHITECTURES, did_you_mean, resolve_backend
from schedulers.compatibility import resolve as resolve_settings

MAX_COLLECTIVE_S = 86_400


def resolve_config(config: RunConfig) -> None:
    """Fill null keys from the model, in place, and refuse what cannot run."""
    check_keys_of_tasks(config)
    task = TRAITS[config.task.name]
    if not task.is_run:
        return  # generates nothing, so the rest is not checked
    if task.only_shapes:
        config.model.load = Load.dummy
        if config.parallel != ParallelConfig():
            name = config.task.name.name
            warnings.warn(f"parallel has no effect with task={name}, which lists every layout", stacklevel=2)
    _resolve_request(config)
    _check_layout(config, _check_model(config))
    if config.scheduler.family != PUBLISHED_FAMILY:
        resolve_settings(noise_scheduler_settings(config.scheduler), config.request.steps)
    resolve_backend(config.attention.backend)
    check_engine(config)
    resolve_optimize(config)
    _check_cache(config)
    check_quantize(config)
    pretrained.check(config.quality)
    if config.task.warmup < 0 or config.task.repeats < 1:
        raise ValueError("task.warmup must be at least 0 and task.repeats at least 1")
    if config.task.max_pixel_error is not None and not config.task.fidelity:
        raise ValueError(
            f"task.max_pixel_error={config.task.max_pixel_error} limits a measured error; add task.fidelity=true"
        )
    _check_reference(config)
    if config.launch.reuse < 0:
        raise ValueError(f"launch.reuse={config.launch.reuse}; give at least 0, which starts fresh ranks for every job")


def check_keys_of_tasks(config: RunConfig) -> None:
    """Refuse a key that has an effect in other tasks only.

    Raises:
        ValueError: The message names the key and its tasks.
    """
    unused = [
        key
        for key, tasks in KEYS_OF_TASKS.items()
        if config.task.name not in tasks and attrgetter(key)(config) is not None
    ]
    if unused:
        tasks = KEYS_OF_TASKS[unused[0]]
        keys = [key for key in unused if KEYS_OF_TASKS[key] == tasks]
        verb = "have" if len(keys) > 1 else "has"
        raise ValueError(
            f"{' and '.join(keys)} {verb} an effect with task={' or '.join(task.name for task in tasks)} only; add "
            f"{'it' if len(tasks) == 1 else 'one'}, or drop {keys[0] if len(keys) == 1 else 'them'}"
        )


def _resolve_request(config: RunConfig) -> None:
    request, model = config.request, config.model
    if request.prompt is not None and request.prompts is not None:
        raise ValueError("give request.prompt or request.prompts, not both")
    if request.prompt is not None:
        request.prompts, request.prompt = [request.prompt], None
    if request.prompts is None:
        request.prompts = list(model.examples)
    own = model.checkpoint_defaults.get(config.scheduler.family, CheckpointDefaults())
    steps = model.steps if own.steps is None else own.steps
    guidance = model.guidance if own.guidance is None else own.guidance
    request.steps = steps if request.steps is None else request.steps
    request.guidance = guidance if request.guidance is None else request.guidance
    for name in ("height", "width", "frames", "negative_prompt"):
        if getattr(request, name) is None:
            setattr(request, name, getattr(model, name))
    message = to_message(request)
    check_request(message)
    check_size(message.height, message.width, model.size_multiple, model.max_pixels)
    check_frames(message.frames, model.frame_multiple, model.max_frames)
    if message.frames > 1:
        ffmpeg()


def _check_model(config: RunConfig) -> Path | None:
    """Refuse a checkpoint that cannot run.

    Args:
        config: The configuration.

    Returns:
        The folder of the denoiser's config.json, or None if none is read.

    Raises:
        ValueError: A key of the model has a wrong value.
        CheckpointError: The checkpoint is missing, foreign or incomplete.
    """
    model = config.model
    if model.architecture not in ARCHITECTURES:
        raise ValueError(
            f"model.architecture={model.architecture} is unknown{did_you_mean(model.architecture, ARCHITECTURES)}"
        )
    if not TRAITS[config.task.name].uses_checkpoint:
        return None
    denoiser = denoiser_defaults(config).weights
    apply_training_facts(config)
    layout = locate(model, denoiser, fetch=True)
    check_checkpoint(model, layout, denoiser)
    if config.scheduler.family == PUBLISHED_FAMILY:
        check_published_scheduler(config.scheduler, layout.folder)
    for name in ("size_multiple", "max_pixels", "frame_multiple", "max_frames", "fps"):
        if getattr(model, name) < 1:
            raise ValueError(f"model.{name}={getattr(model, name)}; give at least 1")
    if model.text.cache_mib is not None and model.text.cache_mib < 0:
        raise ValueError(f"model.text.cache_mib={model.text.cache_mib}; give at least 0, which disables the cache")
    if model.offload and not (
        model.text.keep_loaded and config.engine.name == NATIVE and not config.parallel.shard_weights
    ):
        raise ValueError(
            "model.offload=true keeps every network in CPU memory; leave out model.text.keep_loaded=false, "
            "parallel.shard_weights=true and engine=diffusers"
        )
    if model.text.tokens < 1:
        raise ValueError(f"model.text.tokens={model.text.tokens}; give at least 1")
    return layout.config_folder(denoiser)


def _check_cache(config: RunConfig) -> None:
    has_blocks = ARCHITECTURES[config.model.architecture].heads is not None
    check_cache(config.cache, config.model.name, has_blocks, to_message(config.request).guidance)
    if config.cache.name == NO_CACHE:
        return
    if config.engine.name != NATIVE:
        raise ValueError(
            f"cache={config.cache.name} works only in the native engine; leave out engine={config.engine.name}, or use "
            "engine=cache_dit with cache=none"
        )
    if config.cache.name == "teacache" and config.engine.optimize is Optimize.compile:
        raise ValueError(
            "cache=teacache looks into a block, which engine.optimize=compile turns into a graph; use "
            "cache=first_block or engine.optimize=eager"
        )
    if is_approximate(config.parallel):
        raise ValueError(
            f"cache={config.cache.name} skips evaluations whose keys and values this layout reuses in the next one; "
            "leave out parallel.displaced and parallel.pipe, or use cache=none"
        )
    if not TRAITS[config.task.name].generates:
        warnings.warn(f"cache has no effect with task={config.task.name.name}", stacklevel=2)


def _check_reference(config: RunConfig) -> None:
    steps = config.task.reference_steps
    if steps is None:
        return
    if not config.task.fidelity:
        raise ValueError(f"task.reference_steps={steps} belongs to a measured error; add task.fidelity=true")
    if config.task.fidelity_per_step and steps != config.request.steps:
        raise ValueError(
            "task.fidelity_per_step compares step by step, and task.reference_steps is another number; drop one"
        )
    check_request(msgspec.structs.replace(to_message(config.request), steps=steps))


def _check_layout(config: RunConfig, denoiser: Path | None) -> None:
    for axis in (*AXES, "pipe"):
        if (size := getattr(config.parallel, axis)) < 1:
            raise ValueError(f"parallel.{axis}={size}; a degree is at least 1")
    ranks = world_size(degrees(config.parallel))
    if config.launch.mode is LaunchMode.inprocess and ranks > 1:
        raise ValueError(f"launch.mode=inprocess runs one rank, the layout has {ranks}; use launch.mode=torchrun")
    if denoiser is not None:
        for note in check_layout(config.parallel, model_shape(config, denoiser)):
            warnings.warn(note, stacklevel=2)
    threads = config.launch.threads_per_rank
    if threads is not None and threads < 1:
        raise ValueError(f"launch.threads_per_rank={threads}; give at least 1, or null for cores / ranks")
    waiting = config.launch.collective_timeout_s
    if not 1 <= waiting <= MAX_COLLECTIVE_S:
        raise ValueError(f"launch.collective_timeout_s={waiting:g}; give 1 to {MAX_COLLECTIVE_S} seconds")
