"""The pipeline of one model: checked stages, and the executor that runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from harness.config.kinds import STAGES
from harness.messages import GenerationRequest
from harness.pipeline.executor import PipelineExecutor
from harness.pipeline.stage import Stage, check_wiring
from harness.pipeline.state import ImageSpec, image_specs
from harness.pipeline.text import PromptCache
from harness.pipeline.validate import InputValidation, Limits
from harness.plugins.options import own_options
from harness.resolve.run import ResolvedRun
from models.checkpoint_source import CheckpointSource
from models.components import Components
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.registry import imported


class MakeStage(Protocol):
    """The function that a plug-in registers for a stage."""

    def __call__(self, run: ResolvedRun, components: Components, **options: Any) -> Stage:
        """Return the stage of a run.

        Args:
            run: the resolved run.
            components: the loaded components; of a baseline engine, the native ones without memory.
            **options: the options that the plug-in declared.
        """


@dataclass(frozen=True)
class EngineStages:
    """What a baseline engine makes: the stages after the first one.

    Args:
        stages: the stages, in order.
        check: a function that raises ValueError for an image that the engine cannot generate.
    """

    stages: list[Stage]
    check: Callable[[ImageSpec], None] = lambda spec: None


class MakeStages(Protocol):
    """The function that is registered for a baseline engine."""

    def __call__(
        self,
        run: ResolvedRun,
        source: CheckpointSource,
        components: Components,
        noise_scheduler: NoiseScheduler,
        prompts: PromptCache,
        **options: Any,
    ) -> EngineStages:
        """Return the stages of a run.

        Args:
            run: the resolved run.
            source: the checkpoint's files.
            components: the native components without memory, for geometry and guidance.
            noise_scheduler: the noise scheduler of a native run.
            prompts: the cache of encoded prompts.
            **options: the options that the plug-in declared.
        """


class EngineValidation(InputValidation):
    """Stage 1, which also refuses what an engine cannot generate.

    Args:
        limits: the model's limits.
        noise_scheduler: the noise scheduler, which refuses step counts that its path cannot be divided into.
        check_image: a function that raises ValueError for such an image.
    """

    def __init__(
        self, limits: Limits, noise_scheduler: NoiseScheduler, check_image: Callable[[ImageSpec], None]
    ) -> None:
        super().__init__(limits, noise_scheduler)
        self._check_image = check_image

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request that cannot run. Raises ValueError."""
        super().check(request)
        self._check_image(image_specs(request)[0])


def with_own_stages(stages: Sequence[Stage], run: ResolvedRun, components: Components) -> list[Stage]:
    """Return the stages with those that the configuration adds.

    Args:
        stages: the stages of the engine, in order.
        run: the resolved run.
        components: the loaded components.

    Returns:
        All stages, in order.

    Raises:
        ValueError: if the engine has no such stage, or the added one has another name.
    """
    found = list(stages)
    for name in run.config.stages:
        entry = STAGES[name]
        make: MakeStage = imported(entry.make)
        stage = make(run, components, **own_options(STAGES, name, run.config.plugin))
        names = [other.name for other in found]
        if stage.name != name:
            raise ValueError(f"stages={name}: the stage names itself {stage.name}; give it name = {name!r}")
        beside = entry.before or entry.after
        if beside not in names:
            raise ValueError(
                f"stages={name} comes beside {beside}, which engine={run.config.engine.name} does not have"
            )
        found.insert(names.index(beside) + bool(entry.after), stage)
    return found


class ComposedPipeline:
    """Stages in order, whose wiring is checked when the pipeline is built.

    Args:
        validation: the first stage; rank 0 also uses it before it accepts a request.
        stages: the stages after it.
        executor: runs the stages; a worker calls it.

    Raises:
        ValueError: if a stage reads what no earlier one writes.
    """

    def __init__(self, validation: InputValidation, stages: list[Stage], executor: PipelineExecutor) -> None:
        self.validation = validation
        self.stages: list[Stage] = [validation, *stages]
        self.executor = executor
        check_wiring(self.stages)

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request that this pipeline cannot generate.

        Args:
            request: the request.

        Raises:
            ValueError: with what to change, in one line.
        """
        self.validation.check(request)
