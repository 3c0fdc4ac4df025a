"""The stages of a baseline engine, for the same checkpoint."""

from __future__ import annotations

from harness.baselines.build import native_components
from harness.build.common import cache_mib, limits_of, noise_scheduler_of
from harness.config.engines import ENGINES
from harness.pipeline.composed import ComposedPipeline, EngineValidation, MakeStages, with_own_stages
from harness.pipeline.executor import SyncExecutor
from harness.pipeline.text import PromptCache
from harness.plugins.options import own_options
from harness.resolve.image_sides import check_size_multiple
from harness.resolve.run import ResolvedRun
from models.checkpoint_source import CheckpointSource
from schedulers.registry import imported


def baseline_pipeline(run: ResolvedRun, source: CheckpointSource) -> ComposedPipeline:
    """Build the stages that the engine makes of the checkpoint.

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
    components = native_components(config.model.architecture, source, config.plugin)
    check_size_multiple(config.model.size_multiple, components.size_multiple)
    noise_scheduler, limits = noise_scheduler_of(run, source, components), limits_of(run, components)
    make: MakeStages = imported(ENGINES[config.engine.name].make)
    options = own_options(ENGINES, config.engine.name, config.plugin)
    made = make(run, source, components, noise_scheduler, PromptCache(cache_mib(config)), **options)
    validation = EngineValidation(limits, noise_scheduler, made.check)
    return ComposedPipeline(validation, with_own_stages(made.stages, run, components), SyncExecutor())
