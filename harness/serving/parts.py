"""A request as parts of one image each, which join and leave batches alone, and the answer merged from them."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TypeAlias

import msgspec

from harness.messages import Failure, GenerationRequest, RankOutcome, decode, encode
from harness.pipeline.state import ImageSpec, image_specs
from harness.serving.outcomes import merge_outcomes
from harness.serving.policy import TrackedRequest, evaluation_work

PartKey: TypeAlias = tuple[str, int]
"""The id of a request, and the index of one of its images."""


class Part(msgspec.Struct, frozen=True):
    """One image of a request.

    Args:
        request: the request, reduced to this image.
        index: the index of the image in the whole request.
        client: the client that it counts for.
    """

    request: GenerationRequest
    index: int
    client: str

    @property
    def key(self) -> PartKey:
        """The name of the part, unique among those in progress."""
        return self.request.request_id, self.index

    @property
    def work(self) -> float:
        """The work of one evaluation."""
        return evaluation_work(self.request)

    @property
    def spec(self) -> ImageSpec:
        """The image that it generates, with its index in the whole request."""
        return replace(image_specs(self.request)[0], index=self.index)


def part(tracked: TrackedRequest, index: int) -> Part:
    """Return one part of a request; its image has the prompt and the seed that it has in the whole request."""
    request = tracked.request
    one = msgspec.structs.replace(
        request,
        prompts=[request.prompts[index // request.samples_per_prompt]],
        samples_per_prompt=1,
        batch_size=1,
        seed=request.seed_of(index),
        seeds=[],
        previews=0 if index else request.previews,
    )
    return Part(one, index, tracked.turn)


class OpenRequest:
    """A request of which a part has begun.

    Args:
        tracked: the request and its client.

    Attributes:
        tracked: the request and its client.
        replicas: the replica of every part in progress, by its index.
        denoised: the parts in progress that have had all their evaluations.
        failed: whether a part has failed, so that no other one begins.
        stopped: whether its parts were stopped.
    """

    def __init__(self, tracked: TrackedRequest) -> None:
        self.tracked = tracked
        self.replicas: dict[int, int] = {}
        self.denoised: set[int] = set()
        self.failed = False
        self.stopped = False
        self._images = len(tracked.request.prompts) * tracked.request.samples_per_prompt
        self._taken = 0
        self._began = time.perf_counter()
        self._stages: set[str] = set()
        self._steps_done: dict[int, int] = {}
        self._steps = 0
        self._outcomes: list[list[bytes]] = []
        self._answered_parts = 0
        self._failure: list[bytes] | None = None

    @property
    def has_left(self) -> bool:
        """Whether parts wait for a replica."""
        return not (self.failed or self.stopped) and self._taken < self._images

    @property
    def images_done(self) -> tuple[int, int] | None:
        """The finished images and all images; None while an image denoises, after a failure, and at the end."""
        if self.failed or self.stopped or self._steps_left or self._answered_parts == self._images:
            return None
        return self._answered_parts, self._images

    @property
    def _steps_left(self) -> bool:
        return sum(self._steps_done.values()) < self._steps * self._images

    @property
    def is_done(self) -> bool:
        """Whether no part is in progress and none waits."""
        return not self.replicas and not self.has_left

    def take(self, replica: int) -> Part:
        """Return the next part, which a replica begins."""
        taken = part(self.tracked, self._taken)
        self.replicas[self._taken] = replica
        self._taken += 1
        return taken

    def on_progress(self, index: int, stage: str, done: int, total: int) -> tuple[str, int, int] | None:
        """Record the progress of a part.

        Args:
            index: the index of the part.
            stage: the stage that it is in.
            done: the number of solver steps that it has finished; 0 at the start of a stage.
            total: the number of its solver steps; 0 at the start of a stage.

        Returns:
            The progress of the whole request, whose steps are those of all images. None if it is in no new stage: it
            decodes once every part has finished its steps.
        """
        if total:
            self._steps_done[index], self._steps = done, total
            if done == total:
                self.denoised.add(index)
            return stage, sum(self._steps_done.values()), total * self._images
        if self._steps_left or stage in self._stages:
            return None
        self._stages.add(stage)
        return stage, 0, 0

    def on_outcome(self, index: int, of_ranks: list[list[bytes]]) -> None:
        """Record the end of a part; after a failure no other part begins.

        Args:
            index: the index of the part.
            of_ranks: the frames of a RankOutcome of every rank of its replica.
        """
        del self.replicas[index]
        self.denoised.discard(index)
        self._steps_done[index] = self._steps
        self._answered_parts += 1
        failures = [frames for frames in of_ranks if _is_failure(frames)]
        if failures:
            self._failure, self.failed = self._failure or failures[0], True
        else:
            self._outcomes += of_ranks

    def answer(self) -> list[bytes]:
        """Return the frames of the answer: the merged result, or the first failure."""
        request, took_ms = self.tracked.request, (time.perf_counter() - self._began) * 1e3
        if self._failure is not None:
            return merge_outcomes(request, [self._failure], took_ms)
        if self._answered_parts < self._images:
            return encode(Failure(request.request_id, "cancelled", "the request was cancelled"))
        return merge_outcomes(request, self._outcomes, took_ms)


def _is_failure(frames: list[bytes]) -> bool:
    outcome = decode(frames)
    return isinstance(outcome, RankOutcome) and outcome.failure is not None
