"""Input validation: what this pipeline cannot generate is refused on every rank, before the first collective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harness.messages import GenerationRequest
from harness.pipeline.state import RunContext, Sample, WithSolver
from harness.pipeline.timesteps import image_tokens
from harness.resolve.limits import check_frames, check_largest_side, check_previews, check_request, check_size
from harness.resolve.prompts import check_guidance
from schedulers.noise_scheduler import NoiseScheduler


@dataclass(frozen=True)
class Limits:
    """What a model can generate.

    Args:
        size_multiple: height and width must be multiples of it, pixels.
        max_pixels: the largest height * width.
        frame_multiple: the frames after the first must be a multiple of it.
        max_frames: the most frames; 1 for images only.
        max_side: pixels on a side at which the network's positions end; None if they do not end.
        has_guidance: whether the model has guidance.
        check_prompt: raises ValueError for a prompt that the model cannot take.
        check_layout: raises ValueError for a request that the ranks cannot share.
        no_previews: why no previews can be made; empty if they can.
    """

    size_multiple: int
    max_pixels: int
    frame_multiple: int = 1
    max_frames: int = 1
    max_side: int | None = None
    has_guidance: bool = True
    check_prompt: Callable[[str], None] = lambda prompt: None
    check_layout: Callable[[GenerationRequest], None] = lambda request: None
    no_previews: str = ""


class InputValidation:
    """Stage 1.

    Args:
        limits: what the model can generate.
        noise_scheduler: refuses step counts that its path cannot be divided into.
        with_solver: returns it with the solver that a request names, or raises ValueError; None if it has one solver.
    """

    name = "input_validation"
    reads = frozenset({"spec"})
    writes: frozenset[str] = frozenset()

    def __init__(self, limits: Limits, noise_scheduler: NoiseScheduler, with_solver: WithSolver | None = None) -> None:
        self.limits = limits
        self.noise_scheduler = noise_scheduler
        self._with_solver = with_solver

    def noise_scheduler_of(self, request: GenerationRequest) -> NoiseScheduler:
        """Return the noise scheduler with the request's solver.

        Args:
            request: the request.

        Raises:
            ValueError: if the solver cannot run.
        """
        if not request.solver:
            return self.noise_scheduler
        if self._with_solver is None:
            raise ValueError(f"solver={request.solver}: this engine has the one of its configuration; drop solver")
        return self._with_solver(request.solver)

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        """Check the sizes of every sample."""
        for sample in samples:
            check_size(sample.spec.height, sample.spec.width, self.limits.size_multiple, self.limits.max_pixels)

    def evaluations(self, request: GenerationRequest) -> int:
        """Return the network evaluations of one image, guidance not counted; its steps if the sample decides."""
        tokens = image_tokens(request.height, request.width, self.limits.size_multiple)
        noise_scheduler = self.noise_scheduler_of(request)
        return noise_scheduler.solver.evaluations(noise_scheduler.grid(request.steps, tokens)) or request.steps

    def check(self, request: GenerationRequest) -> None:
        """Refuse a whole request, before any rank has received it.

        Args:
            request: the request.

        Raises:
            ValueError: with what to change, in one line.
        """
        limits = self.limits
        check_request(request)
        check_size(request.height, request.width, limits.size_multiple, limits.max_pixels)
        check_largest_side(request, limits.max_side)
        check_frames(request.frames, limits.frame_multiple, limits.max_frames)
        check_guidance(request, limits.has_guidance)
        check_previews(request, limits.no_previews)
        limits.check_layout(request)
        for prompt in (*request.prompts, request.negative_prompt):
            limits.check_prompt(prompt)
        tokens = image_tokens(request.height, request.width, limits.size_multiple)
        self.noise_scheduler_of(request).grid(request.steps, tokens)
