"""The pipeline of one model: checked stages, and the executor that runs them."""

from __future__ import annotations

from harness.messages import GenerationRequest
from harness.pipeline.executor import PipelineExecutor
from harness.pipeline.stage import Stage, check_wiring
from harness.pipeline.validate import InputValidation


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
