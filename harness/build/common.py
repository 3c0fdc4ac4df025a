"""What the native engine and the baseline engines both need of a resolved run: source, noise scheduler and limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from harness.config.schema import Load, RunConfig
from harness.config.tasks import TRAITS
from harness.datasets.dataset import is_given
from harness.device.device import torch_dtype
from harness.messages import GenerationRequest
from harness.pipeline.state import WithSolver
from harness.pipeline.validate import Limits
from harness.resolve.layout import shape_for_request
from harness.resolve.layout_rules import check_layout
from harness.resolve.limits import no_previews
from harness.resolve.published_scheduler import scheduler_file
from harness.resolve.run import ResolvedRun
from harness.resolve.solvers import run_with_solver
from models.checkpoint_source import CheckpointSource, LoraFile
from models.components import Components
from schedulers.build import build as build_noise_scheduler
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import LearnedVariance
from schedulers.published import from_diffusers

DEFAULT_CACHE_MIB = 64.0
DATASET_CACHE_MIB = 8.0
"""MiB of encoded prompts that are cached by default."""


def source_of(run: ResolvedRun, device: torch.device) -> CheckpointSource:
    """Return where this run's components are loaded from.

    Args:
        run: the resolved run.
        device: the device that computes.

    Returns:
        The checkpoint's files, and how to load them.

    Raises:
        CheckpointError: if there is no such folder or file.
    """
    model, place = run.config.model, run.checkpoint
    return CheckpointSource(
        folder=place.folder,
        denoiser=run.denoiser,
        device=device,
        dtype=torch_dtype(model.dtype),
        dtypes={name: torch_dtype(dtype) for name, dtype in place.dtypes.items()},
        replaced=place.replaced,
        dummy=model.load is Load.dummy,
        text_tokens=model.text.tokens,
        loras=tuple(LoraFile(Path(lora.path).expanduser(), lora.weight) for lora in model.lora),
    )


def noise_scheduler_of(run: ResolvedRun, source: CheckpointSource, components: Components) -> NoiseScheduler:
    """Build the run's noise scheduler: the checkpoint's own, or the one that group `scheduler` composes.

    Args:
        run: the resolved run.
        source: the checkpoint's files.
        components: the loaded components.

    Returns:
        The noise scheduler, which takes a learned variance if the network outputs one.

    Raises:
        ValueError: if a published configuration, or the settings, cannot run.
    """
    if run.noise_scheduler is None:
        noise_scheduler = from_diffusers(scheduler_file(source.folder), even_sigmas=components.even_sigmas)
    else:
        noise_scheduler = build_noise_scheduler(run.noise_scheduler)
    learns_variance = isinstance(noise_scheduler.prediction, LearnedVariance)
    if learns_variance and not components.learned_variance:
        change = (
            "choose another noise scheduler"
            if run.noise_scheduler is None
            else f"set model.checkpoint_defaults.{run.noise_scheduler.family}.learned_variance=false"
        )
        raise ValueError(
            "the noise scheduler expects a learned variance, but this network outputs no more channels than the state "
            f"has; {change}"
        )
    if components.learned_variance and not learns_variance:
        noise_scheduler = replace(noise_scheduler, prediction=LearnedVariance(noise_scheduler.prediction, use=False))
    return noise_scheduler


def solver_choice(run: ResolvedRun, own: NoiseScheduler) -> WithSolver:
    """Return what gives a run's noise scheduler the solver that a request names, built when it is first asked for.

    Args:
        run: the resolved run.
        own: the noise scheduler of the run.

    Returns:
        A function of the solver's name; it raises ValueError for one that cannot run.
    """
    made: dict[str, NoiseScheduler] = {}

    def with_solver(solver: str) -> NoiseScheduler:
        if solver not in made:
            settings = run_with_solver(run, solver).noise_scheduler
            if settings is None or settings == run.noise_scheduler:
                made[solver] = own
            else:
                made[solver] = replace(own, solver=build_noise_scheduler(settings).solver)
        return made[solver]

    return with_solver


def limits_of(run: ResolvedRun, components: Components) -> Limits:
    """Return what the configuration, its layout and the checkpoint allow a request to have."""
    model, layout, shape = run.config.model, run.config.parallel, run.shape

    def check(request: GenerationRequest) -> None:
        check_layout(layout, shape_for_request(shape, model, request))

    return Limits(
        model.size_multiple,
        model.max_pixels,
        model.frame_multiple,
        model.max_frames,
        components.max_side,
        components.guidance.possible,
        components.check_prompt,
        check,
        no_previews(run.config),
    )


def cache_mib(config: RunConfig) -> float:
    """Return the MiB of encoded prompts to cache.

    A bench encodes every time, to measure it, unless the encoders are dropped. A data set has each prompt once, so that
    little is kept, for the negative prompt.

    Args:
        config: the resolved configuration.

    Returns:
        The limit, MiB.
    """
    text = config.model.text
    if text.cache_mib is not None:
        return text.cache_mib
    traits = TRAITS[config.task.name]
    if traits.measures and text.keep_loaded:
        return 0.0
    return DATASET_CACHE_MIB if traits.streams_dataset and is_given(config.dataset) else DEFAULT_CACHE_MIB
