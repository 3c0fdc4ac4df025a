"""Input validation: what this pipeline cannot draw is refused on every rank alike, before the first collective."""

from __future__ import annotations

from collections.abc import Callable

from harness.config.limits import check_frames, check_request, check_size
from harness.messages import GenerationRequest
from harness.pipeline.state import RunContext, Sample
from harness.pipeline.timesteps import tokens
from schedulers.noise_scheduler import NoiseScheduler


class InputValidation:
    """Stage 1.

    Args:
        size_multiple: height and width are multiples of it, pixels.
        max_pixels: largest height * width.
        noise_scheduler: refuses step counts that its path cannot be cut into.
        frame_multiple: frames after the first are a multiple of it.
        max_frames: most frames; 1 = pictures only.
        check_prompt: refuses prompts that the model cannot take.
        max_side: pixels at which the network's positions end; None where they do not.
    """

    name = "input_validation"
    reads = frozenset({"ask"})
    writes: frozenset[str] = frozenset()

    def __init__(
        self,
        size_multiple: int,
        max_pixels: int,
        noise_scheduler: NoiseScheduler,
        frame_multiple: int = 1,
        max_frames: int = 1,
        check_prompt: Callable[[str], None] = lambda prompt: None,
        max_side: int | None = None,
    ) -> None:
        self.size_multiple = size_multiple
        self.max_pixels = max_pixels
        self.noise_scheduler = noise_scheduler
        self.frame_multiple = frame_multiple
        self.max_frames = max_frames
        self.check_prompt = check_prompt
        self.max_side = max_side

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        for sample in samples:
            check_size(sample.ask.height, sample.ask.width, self.size_multiple, self.max_pixels)

    def check(self, request: GenerationRequest) -> None:
        """Refuses a whole request, before any rank has seen it.

        Raises:
            ValueError: what to change, in one line.
        """
        check_request(request)
        check_size(request.height, request.width, self.size_multiple, self.max_pixels)
        if self.max_side is not None and max(request.height, request.width) > self.max_side:
            raise ValueError(
                f"the request asks for {request.height} x {request.width} pixels; this checkpoint has positions for "
                f"{self.max_side} a side"
            )
        check_frames(request.frames, self.frame_multiple, self.max_frames)
        for prompt in (*request.prompts, request.negative_prompt):
            self.check_prompt(prompt)
        self.noise_scheduler.grid(request.steps, tokens(request.height, request.width, self.size_multiple))
