"""The rules of a configuration: the model fills null keys, and combinations that cannot run are refused."""

from __future__ import annotations

import os
import warnings
from operator import attrgetter
from pathlib import Path

import msgspec

from harness.config.cache import NONE as NO_CACHE
from harness.config.cache import check_cache
from harness.config.schema import CheckpointDefaults, Load, ParallelConfig, RunConfig, Task, WandbConfig
from harness.config.tasks import KEYS_OF_TASKS, TRAITS
from harness.metrics import pretrained
from harness.records.media import ffmpeg
from harness.records.record import read_record
from harness.resolve.checkpoint import check_checkpoint
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY, apply_training_facts, check_learned_variance
from harness.resolve.conflicts import CONFLICTS, OTHER_CONFLICTS, check_conflicts
from harness.resolve.dataset import all_prompts, at_line, loaded_dataset, own_requests, resolve_dataset, resolve_trace
from harness.resolve.engine import check_baseline_settings, check_engine, check_first_blocks
from harness.resolve.engines_table import CACHE_DIT, ON_DIFFUSERS, refuse_missing_engine
from harness.resolve.image_sides import check_image_sides
from harness.resolve.kinds import check_attention, check_guidance_rule, check_stages
from harness.resolve.layout_rules import check_layout
from harness.resolve.limits import check_frames, check_request, check_size
from harness.resolve.optimize import resolve_optimize
from harness.resolve.options import check_options
from harness.resolve.packages import check_packages, require_extra
from harness.resolve.plugin_rules import check_plugins
from harness.resolve.plugins import resolve_plugins
from harness.resolve.prompts import check_prompts, check_text_tokens
from harness.resolve.published_scheduler import check_published_scheduler
from harness.resolve.request import to_message
from harness.resolve.run import ResolvedRun
from harness.resolve.training import check_training
from harness.resolve.wait_policy import check_wait_policy
from models.registry import resolve_backend
from schedulers.compatibility import resolve as resolve_settings
from schedulers.limits import check_tokens
from schedulers.settings import NoiseSchedulerSettings

MAX_TAG = 64  # characters; wandb takes no more
MAX_WANDB_NAME = 127  # characters of a project, entity, group or run there
NOT_IN_PROJECT = "/\\#?%:"  # characters that wandb takes in no project's name


def resolve_config(config: RunConfig) -> None:
    """Fill null keys from the model, in place, and refuse what cannot run."""
    resolve_plugins(config)
    check_options(config)
    check_keys_of_tasks(config)
    check_wandb_names(config.logger.wandb)
    task = TRAITS[config.task.name]
    if not task.is_run:
        return  # generates nothing, so the rest is not checked
    if task.only_shapes:
        config.model.load = Load.dummy
        if config.parallel != ParallelConfig():
            name = config.task.name.name
            warnings.warn(f"parallel has no effect with task={name}, which lists every layout", stacklevel=2)
    if config.task.name is Task.load and config.load.url is not None:
        _resolve_external(config)
        return  # the server has its own model, so the rest is not checked
    _resolve_request(config)
    _check_packages(config)
    resolve_optimize(config)
    check_plugins(config)
    check_conflicts(config, CONFLICTS if task.uses_checkpoint else OTHER_CONFLICTS)
    run = ResolvedRun(config, fetch=True)
    if task.uses_checkpoint:
        _check_model(run)
        for note in check_layout(config.parallel, run.shape):
            warnings.warn(note, stacklevel=2)
        check_attention(config)
        check_guidance_rule(config, run.shape)
        check_stages(config)
        _check_dataset(run)
    if run.noise_scheduler is not None:
        _check_noise_scheduler(config, resolve_settings(run.noise_scheduler, config.request.steps))
    if config.task.name is Task.train:
        check_training(config.train, run.noise_scheduler)
    check_engine(config)
    check_wait_policy(config)
    _check_cache(config)
    pretrained.check(config.quality)
    if config.task.max_pixel_error is not None and not config.task.fidelity:
        raise ValueError(
            f"task.max_pixel_error={config.task.max_pixel_error} limits a measured error; add task.fidelity=true"
        )
    _check_reference(config)
    _check_remarks(config)


def _check_remarks(config: RunConfig) -> None:
    """Refuse a tag that wandb would refuse, and a run to compare with that is not there."""
    for tag in config.tags:
        if not 0 < len(tag) <= MAX_TAG:
            raise ValueError(f"tags: {tag!r} has {len(tag)} characters; give 1 to {MAX_TAG}")
    if config.rerun_of is None:
        return
    if read_record(Path(config.rerun_of)) is None:
        raise ValueError(f"rerun_of={config.rerun_of}: no record there; it is the folder of a run, runs/DATE/TIME")
    if config.task.name not in (Task.generate, Task.bench):
        name = config.task.name.name
        warnings.warn(f"rerun_of has no effect with task={name}, which compares no images with it", stacklevel=2)


def check_wandb_names(config: WandbConfig) -> None:
    """Refuse names that wandb would refuse after the run.

    Raises:
        ValueError: One line says what to change.
    """
    given = {f"logger.wandb.{name}": getattr(config, name) for name in ("project", "entity", "group", "name")}
    given["WANDB_PROJECT"] = os.environ.get("WANDB_PROJECT") or None
    for key, value in given.items():
        if value is not None and not 0 < len(value) <= MAX_WANDB_NAME:
            raise ValueError(f"{key} has {len(value)} characters; give 1 to {MAX_WANDB_NAME}")
        if key.lower().endswith("project") and value is not None and (found := set(value) & set(NOT_IN_PROJECT)):
            raise ValueError(f"{key}={value}: the name of a wandb project has no {' or '.join(sorted(found))}")


def _check_noise_scheduler(config: RunConfig, settings: NoiseSchedulerSettings) -> None:
    """Refuse settings that the request's image, or the engine, cannot have.

    Raises:
        ValueError: One line says what to change.
    """
    request, side = to_message(config.request), config.model.size_multiple
    check_tokens(settings, (request.height // side) * (request.width // side))
    if config.engine.name in ON_DIFFUSERS:
        check_baseline_settings(config, settings)


def _check_packages(config: RunConfig) -> None:
    """Refuse a task, engine, attention backend or quantization whose package is not installed."""
    check_packages(config)
    refuse_missing_engine(config.engine.name)
    resolve_backend(config.attention.backend)


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


def _resolve_external(config: RunConfig) -> None:
    """Refuse what concerns neither this project's model nor its ranks; what the request leaves open stays so."""
    _resolve_prompts(config)
    check_packages(config)
    _check_remarks(config)


def _resolve_prompts(config: RunConfig) -> None:
    request = config.request
    resolve_trace(config)
    resolve_dataset(config)
    if request.prompt is not None and request.prompts is not None:
        raise ValueError("give request.prompt or request.prompts, not both")
    if request.prompt is not None:
        request.prompts, request.prompt = [request.prompt], None


def _resolve_request(config: RunConfig) -> None:
    request, model = config.request, config.model
    _resolve_prompts(config)
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
        require_extra(f"request.frames={message.frames}", "video")
        ffmpeg()


def _check_model(run: ResolvedRun) -> None:
    """Download what is missing of a checkpoint, and refuse one that cannot run.

    Raises:
        ValueError: A key of the model has a wrong value.
        CheckpointError: The checkpoint is missing, foreign or incomplete.
    """
    config = run.config
    apply_training_facts(config)
    check_checkpoint(config.model, run.checkpoint, run.denoiser)
    check_learned_variance(config, run.checkpoint.config_folder(run.denoiser))
    check_image_sides(config, run.checkpoint, run.denoiser)
    check_text_tokens(config.model, run.checkpoint)
    if config.engine.name == CACHE_DIT:
        check_first_blocks(config, run.checkpoint.config_folder(run.denoiser))
    check_prompts(config.model, run.checkpoint, run.denoiser, to_message(config.request))
    if config.scheduler.family == PUBLISHED_FAMILY:
        check_published_scheduler(config.scheduler, run.checkpoint.folder, config.request.steps)


def _check_dataset(run: ResolvedRun) -> None:
    """Refuse a prompt or a size of a data set that the model cannot make, if each prompt is a request.

    Raises:
        ValueError: One line has the line of the file.
    """
    config = run.config
    dataset = loaded_dataset(config) if run.dataset is None else run.dataset
    if dataset is None:
        return
    message = msgspec.structs.replace(to_message(config.request), prompts=all_prompts(dataset))
    check_prompts(config.model, run.checkpoint, run.denoiser, message)
    for prompt, own in own_requests(config, dataset):
        try:
            check_size(*_sides(own), config.model.size_multiple, config.model.max_pixels)
            check_image_sides(own, run.checkpoint, run.denoiser)
            check_layout(own.parallel, ResolvedRun(own).shape)
        except ValueError as error:
            raise ValueError(f"{at_line(dataset, prompt)}: {str(error).replace('request.', '')}") from error


def _sides(config: RunConfig) -> tuple[int, int]:
    message = to_message(config.request)
    return message.height, message.width


def _check_cache(config: RunConfig) -> None:
    check_cache(config.cache, config.model.name, to_message(config.request).guidance)
    if config.cache.name != NO_CACHE and not TRAITS[config.task.name].generates:
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
