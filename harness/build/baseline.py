"""The stages around a baseline engine's pipeline of the same checkpoint."""

from __future__ import annotations

from harness.baselines.build import baseline_stages, native_components
from harness.build.common import cache_mib, limits_of, noise_scheduler_of
from harness.pipeline.composed import ComposedPipeline
from harness.pipeline.executor import SyncExecutor
from harness.resolve.image_sides import check_size_multiple
from harness.resolve.run import ResolvedRun
from models.checkpoint_source import CheckpointSource


def baseline_pipeline(run: ResolvedRun, source: CheckpointSource) -> ComposedPipeline:
    """Build the stages around diffusers' pipeline of the checkpoint.

    Args:
        run: the resolved run.
        source: the checkpoint's files.

    Returns:
        The pipeline.

    Raises:
        CheckpointError: if weights are missing, broken or do not fit.
        ValueError: if settings do not go together.
    """
    config = run.config
    components = native_components(config.model.architecture, source)
    check_size_multiple(config.model.size_multiple, components.size_multiple)
    noise_scheduler, limits = noise_scheduler_of(run, source, components), limits_of(run, components)
    stages = baseline_stages(run, source, components, noise_scheduler, limits, cache_mib(config))
    return ComposedPipeline(stages.validation, stages.stages, SyncExecutor())
