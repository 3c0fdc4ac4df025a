"""The stages round another engine's pipeline of the same checkpoint."""

from __future__ import annotations

from harness.baselines.build import baseline_stages, native_components
from harness.build.parts import cache_mib, check_multiple, limits_of, noise_scheduler_of
from harness.config.schema import RunConfig
from harness.pipeline.composed import ComposedPipeline
from harness.pipeline.executor import SyncExecutor
from models.source import Source


def baseline_pipeline(config: RunConfig, source: Source) -> ComposedPipeline:
    """The stages around diffusers' pipeline of the checkpoint.

    Raises:
        CheckpointError: weights that are missing, broken or do not fit.
        ValueError: settings that do not go together.
    """
    parts = native_components(config.model.architecture, source)
    check_multiple(config.model, parts)
    noise_scheduler, limits = noise_scheduler_of(config, source, parts), limits_of(config, parts)
    found = baseline_stages(config, source, parts, noise_scheduler, limits, cache_mib(config))
    return ComposedPipeline(found.validation, found.stages, SyncExecutor())
