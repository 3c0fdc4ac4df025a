"""What a resolved run needs whoever runs it: the source of its components, its noise scheduler, its limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from harness.config.schema import Load, ModelConfig, RunConfig, Task
from harness.device.device import torch_dtype
from harness.messages import GenerationRequest
from harness.pipeline.validate import Limits
from harness.resolve.checkpoint import locate
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY, denoiser_defaults
from harness.resolve.layout import model_shape, shape_for_request
from harness.resolve.layout_rules import check_layout
from harness.resolve.published_scheduler import scheduler_file
from harness.resolve.scheduler import noise_scheduler_settings
from models.components import Components
from models.source import LoraFile, Source
from schedulers.build import build as build_noise_scheduler
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import LearnedVariance
from schedulers.published import from_diffusers

DEFAULT_CACHE_MIB = 64.0


def source_of(config: RunConfig, device: torch.device) -> Source:
    """Where this run's components are read from.

    Raises:
        CheckpointError: no such folder or file.
    """
    model, denoiser = config.model, denoiser_defaults(config).weights
    place = locate(model, denoiser)
    return Source(
        folder=place.folder,
        denoiser=denoiser,
        device=device,
        dtype=torch_dtype(model.dtype),
        dtypes={name: torch_dtype(dtype) for name, dtype in place.dtypes.items()},
        replaced=place.replaced,
        dummy=model.load is Load.dummy,
        text_tokens=model.text.tokens,
        loras=tuple(LoraFile(Path(lora.path).expanduser(), lora.weight) for lora in model.lora),
    )


def noise_scheduler_of(config: RunConfig, source: Source, parts: Components) -> NoiseScheduler:
    """The run's noise scheduler: the checkpoint's own, or the one that group `scheduler` composes.

    Raises:
        ValueError: a published configuration, or settings, that cannot run.
    """
    if config.scheduler.family == PUBLISHED_FAMILY:
        found = from_diffusers(scheduler_file(source.folder), even_sigmas=parts.even_sigmas)
    else:
        found = build_noise_scheduler(noise_scheduler_settings(config.scheduler))
    told = isinstance(found.prediction, LearnedVariance)
    if told and not parts.learned_variance:
        family = config.scheduler.family
        own = family == PUBLISHED_FAMILY
        change = (
            "choose another noise scheduler"
            if own
            else f"set model.checkpoint_defaults.{family}.learned_variance=false"
        )
        raise ValueError(
            "the noise scheduler expects a learned variance, but this network outputs no more channels than the state "
            f"has; {change}"
        )
    if parts.learned_variance and not told:
        found = replace(found, prediction=LearnedVariance(found.prediction, use=False))
    return found


def limits_of(config: RunConfig, parts: Components) -> Limits:
    """What the configuration, its layout and the checkpoint let a request ask."""
    model, denoiser = config.model, denoiser_defaults(config).weights
    facts = model_shape(config, locate(model, denoiser).config_folder(denoiser))

    def check(request: GenerationRequest) -> None:
        check_layout(config.parallel, shape_for_request(facts, model, request))

    return Limits(
        model.size_multiple,
        model.max_pixels,
        model.frame_multiple,
        model.max_frames,
        parts.max_side,
        parts.guidance.possible,
        parts.check_prompt,
        check,
    )


def cache_mib(config: RunConfig) -> float:
    """MiB of encoded prompts to keep: a bench encodes every time, to measure it, unless the encoders are dropped."""
    text = config.model.text
    if text.cache_mib is not None:
        return text.cache_mib
    return 0.0 if config.task.name is Task.bench and text.keep_loaded else DEFAULT_CACHE_MIB


def check_multiple(model: ModelConfig, parts: Components) -> None:
    """Refuses a multiple of sizes that the checkpoint's tokens do not divide.

    Raises:
        ValueError: the multiple to set.
    """
    if model.size_multiple % parts.size_multiple:
        raise ValueError(
            f"model.size_multiple={model.size_multiple}, but this checkpoint draws multiples of {parts.size_multiple} "
            f"pixels; set model.size_multiple={parts.size_multiple}"
        )
