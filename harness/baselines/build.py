"""Build a baseline's stages from a configuration and a checkpoint: text, noise, denoising and decoding."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import replace

import torch

from harness.baselines.cache_dit import DBCache
from harness.baselines.denoise import BaselineDenoising, NoisePreparation
from harness.baselines.model import BaselineLoader, BaselineModel
from harness.baselines.noise_scheduler import MakeScheduler, native_scheduler, published_scheduler
from harness.config.optimize import Optimize
from harness.optimize.compile_blocks import compile_forwards
from harness.pipeline.composed import EngineStages
from harness.pipeline.decode import Decoding
from harness.pipeline.state import require
from harness.pipeline.text import PromptCache, TextEncoding
from harness.pipeline.timesteps import TimestepPreparation
from harness.plugins.options import own_options
from harness.resolve.engines_table import BASELINES, CACHE_DIT, SGLANG, SglangRow, engine_version
from harness.resolve.run import ResolvedRun
from models.attention import sdpa_attention
from models.checkpoint_source import CheckpointSource
from models.components import ComponentLoader, Components
from models.registry import ARCHITECTURES
from schedulers.noise_scheduler import NoiseScheduler


def native_components(
    architecture: str, source: CheckpointSource, plugin: Mapping[str, object] | None = None
) -> Components:
    """Return the native components on the meta device, which takes no memory.

    They provide geometry, guidance and the order of parameters.

    Raises:
        CheckpointError: a configuration that they cannot be built from.
    """
    load: ComponentLoader = importlib.import_module(ARCHITECTURES[architecture].module).load
    meta_source = replace(source, device=torch.device("meta"), dummy=True, loras=(), loaded={})
    return load(meta_source, sdpa_attention, **own_options(ARCHITECTURES, architecture, plugin or {}))


def load_baseline(architecture: str, source: CheckpointSource, parts: Components) -> BaselineModel:
    """Return diffusers' pipeline of a checkpoint, without progress bars, since a rank's log is a file.

    Raises:
        CheckpointError: weights that are missing, broken or do not fit.
    """
    load: BaselineLoader = importlib.import_module(BASELINES[architecture].module).load
    model = load(source, parts)
    model.pipeline.set_progress_bar_config(disable=True)
    return model


def load_sglang(
    model: BaselineModel, row: SglangRow, source: CheckpointSource, parts: Components, make_scheduler: MakeScheduler
) -> BaselineModel:
    """Return diffusers' pipeline with SGLang-Diffusion's network and loop in it (harness.baselines.sglang).

    Args:
        model: diffusers' pipeline.
        row: the SGLang settings of the architecture.
        source: the checkpoint.
        parts: the native components on the meta device.
        make_scheduler: a function that makes the noise scheduler of a micro-batch.

    Raises:
        CheckpointError: SGLang cannot load the network by itself.
        ValueError: one of SGLang's imports is not installed, or SGLang has no such noise scheduler.
    """
    if source.device.type == "cpu":
        os.environ.setdefault(
            "SGLANG_DIFFUSION_PLATFORM_OVERRIDE", "cpu"
        )  # SGLang looks for drivers, torch has already decided
    try:
        sglang = importlib.import_module("harness.baselines.sglang")
    except ImportError as error:
        raise ValueError(f"engine={SGLANG} cannot import SGLang ({error}); install what is named with pip") from error
    built: BaselineModel = sglang.with_sglang(model, row, source, parts, make_scheduler)
    return built


def baseline_stages(
    run: ResolvedRun,
    source: CheckpointSource,
    parts: Components,
    noise_scheduler: NoiseScheduler,
    prompts: PromptCache,
) -> EngineStages:
    """Load diffusers' pipeline and build the stages around it, with the names that they have in a native run.

    Args:
        run: the resolved run.
        source: the checkpoint.
        parts: the native components on the meta device.
        noise_scheduler: the noise scheduler of a native run.
        prompts: the cache of encoded prompts.

    Returns:
        The stages.

    Raises:
        CheckpointError: weights that are missing, broken or do not fit.
        ValueError: a noise scheduler that cannot drive the pipeline, or a cache that skips nothing.
    """
    config, attention = run.config, require(run.attention.in_baseline)
    architecture, published = config.model.architecture, run.noise_scheduler is None
    if published:
        make_scheduler = published_scheduler(source)
    else:
        scales, steps = BASELINES[architecture].families is None, config.request.steps or config.model.steps
        make_scheduler = native_scheduler(noise_scheduler, scales, steps)
    model = load_baseline(architecture, source, parts)
    cache = DBCache(model, config.engine.cache) if config.engine.name == CACHE_DIT else None
    notes, row = [], BASELINES[architecture].sglang
    if config.engine.name == SGLANG and row is not None:
        model = load_sglang(model, row, source, parts, make_scheduler)
        notes.append(
            f"engine={SGLANG}: the network, its inputs, guidance and the loop are those of SGLang-Diffusion "
            f"{engine_version(SGLANG)}; text encoding, decoding, the initial noise and the noise scheduler those of "
            "engine=diffusers"
        )
    if config.engine.optimize is Optimize.compile:
        compiled = compile_forwards([model.network], config.engine.compile, source.device)
        notes.append(f"engine.optimize=compile: diffusers' network {compiled}")
    return EngineStages(
        [
            TextEncoding(lambda: model.prompts, parts.guidance, prompts),
            TimestepPreparation(noise_scheduler, parts.size_multiple),
            NoisePreparation(parts.latent),
            BaselineDenoising(
                model,
                make_scheduler,
                noise_scheduler,
                parts.guidance,
                attention,
                parts.size_multiple,
                has_own_noise=published,
                cache=cache,
                notes=notes,
            ),
            Decoding(model.decode),
        ],
        model.check,
    )
