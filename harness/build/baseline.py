"""The stages around a baseline engine's pipeline of the same checkpoint."""

from __future__ import annotations

from harness.baselines.build import baseline_stages, native_components
from harness.build.common import cache_mib, check_size_multiple, limits_of, noise_scheduler_of
from harness.config.schema import RunConfig
from harness.pipeline.composed import ComposedPipeline
from harness.pipeline.executor import SyncExecutor
from models.checkpoint_source import CheckpointSource


def baseline_pipeline(config: RunConfig, source: CheckpointSource) -> ComposedPipeline:
    """Build the stages around diffusers' pipeline of the checkpoint.

    Args:
        config: the resolved configuration.
        source: the checkpoint's files.

    Returns:
        The pipeline.

    Raises:
        CheckpointError: if weights are missing, broken or do not fit.
        ValueError: if settings do not go together.
    """
    components = native_components(config.model.architecture, source)
    check_size_multiple(config.model, components)
    noise_scheduler, limits = noise_scheduler_of(config, source, components), limits_of(config, components)
    stages = baseline_stages(config, source, components, noise_scheduler, limits, cache_mib(config))
    return ComposedPipeline(stages.validation, stages.stages, SyncExecutor())
