"""The rules of a configuration: the model fills null keys, and combinations that cannot run are refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import msgspec

from harness.config.cache import NONE as NO_CACHE
from harness.config.cache import check_cache
from harness.config.optimize import Optimize
from harness.config.plan import check_plan
from harness.config.schema import CheckpointDefaults, LaunchMode, Load, ParallelConfig, RunConfig, Task
from harness.config.serve import check_load, check_serve
from harness.metrics import pretrained
from harness.parallel.mesh import degrees, world_size
from harness.records.media import ffmpeg
from harness.resolve.checkpoint import check_checkpoint, locate
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY, apply_training_facts, denoiser_defaults
from harness.resolve.comparison import check_comparison
from harness.resolve.engine import check_engine
from harness.resolve.engines_table import NATIVE
from harness.resolve.layout import model_shape
from harness.resolve.layout_rules import check_layout, is_approximate
from harness.resolve.limits import check_frames, check_request, check_server_limits, check_size
from harness.resolve.optimize import resolve_optimize
from harness.resolve.options import check_options
from harness.resolve.published_scheduler import check_published_scheduler
from harness.resolve.quantize import check_quantize
from harness.resolve.request import to_message
from harness.resolve.scheduler import noise_scheduler_settings
from models.registry import ARCHITECTURES, resolve_backend
from schedulers.compatibility import resolve as resolve_settings


def resolve_config(config: RunConfig) -> None:
    """Fill null keys from the model, in place, and refuse what cannot run."""
    check_options(config)
    check_comparison(config)
    _check_report(config)
    if config.task.name is Task.report:
        return  # generates nothing, so the rest is not checked
    if config.task.name is Task.plan:
        config.model.load = Load.dummy  # a plan uses only the shapes of a network
        check_plan(config.plan, config.hardware)
        if config.parallel != ParallelConfig():
            warnings.warn("parallel has no effect with task=plan, which lists every layout", stacklevel=2)
    _resolve_request(config)
    _check_layout(config, _check_model(config))
    if config.scheduler.family != PUBLISHED_FAMILY:
        resolve_settings(noise_scheduler_settings(config.scheduler), config.request.steps)
    resolve_backend(config.attention.backend)
    check_engine(config)
    resolve_optimize(config)
    _check_cache(config)
    check_quantize(config)
    if config.task.name in (Task.serve, Task.load):
        whole = config.model.offload or is_approximate(config.parallel)
        check_serve(config.serve, config.engine.name == NATIVE and not whole)
        check_load(config.load)
    if config.task.name is Task.load:
        _check_load_requests(config)
    pretrained.check(config.quality)
    if config.task.max_pixel_error is not None and not config.task.fidelity:
        raise ValueError(
            f"task.max_pixel_error={config.task.max_pixel_error} limits a measured error; add task.fidelity=true"
        )
    _check_reference(config)


def _check_report(config: RunConfig) -> None:
    if config.task.name is Task.report:
        if config.report.runs is None:
            raise ValueError("task=report needs a folder of runs; add report.runs=DIR, such as report.runs=sweeps")
    else:
        for key in ("runs", "out"):
            if getattr(config.report, key) is not None:
                raise ValueError(f"report.{key} has an effect with task=report only; add it, or drop report.{key}")
    if config.plan.runs is not None and config.task.name is not Task.plan:
        raise ValueError("plan.runs has an effect with task=plan only; add it, or drop plan.runs")


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


def _check_load_requests(config: RunConfig) -> None:
    """Refuse a load with a request that is impossible or that the server does not take."""
    message = to_message(config.request)
    for steps in config.load.steps or [message.steps]:
        sampled = msgspec.structs.replace(message, prompts=message.prompts[:1], steps=steps)
        check_request(sampled)
        check_server_limits(sampled, config.serve)
    for side in config.load.sizes:
        check_size(side, side, config.model.size_multiple, config.model.max_pixels)
    if config.launch.mode is LaunchMode.inprocess:
        raise ValueError("task=load sends many requests at once to ranks of their own; use launch.mode=torchrun")


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
    if config.task.name is Task.train:
        return None
    denoiser = denoiser_defaults(config).weights
    apply_training_facts(config)
    layout = locate(model, denoiser, fetch=True)
    check_checkpoint(model, layout, denoiser)
    if config.scheduler.family == PUBLISHED_FAMILY:
        check_published_scheduler(config.scheduler, layout.folder)
    if model.offload and not (
        model.text.keep_loaded and config.engine.name == NATIVE and not config.parallel.shard_weights
    ):
        raise ValueError(
            "model.offload=true keeps every network in CPU memory; leave out model.text.keep_loaded=false, "
            "parallel.shard_weights=true and engine=diffusers"
        )
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
    if config.task.name in (Task.plan, Task.train):
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
    ranks = world_size(degrees(config.parallel))
    if config.launch.mode is LaunchMode.inprocess and ranks > 1:
        raise ValueError(f"launch.mode=inprocess runs one rank, the layout has {ranks}; use launch.mode=torchrun")
    if denoiser is not None:
        for note in check_layout(config.parallel, model_shape(config, denoiser)):
            warnings.warn(note, stacklevel=2)
