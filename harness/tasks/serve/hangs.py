"""Finding ranks that live and do nothing more, from the times of the steps so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from harness.config.optimize import Optimize
from harness.config.schema import RunConfig
from harness.engines.processes import is_stopped
from harness.messages import DECODING, DENOISING, QUEUED, Failure, GenerationRequest, GenerationResult, Progress
from harness.serving.transport import EngineGone

Kind: TypeAlias = tuple[str, int, int, int, int, str]  # stage, height, width, frames, images in a forward, solver
FACTOR = 20.0  # a step may take this many times the slowest of its kind so far
KEEP = 0.99
FLOOR_S = 5.0  # no step counts as a hang before this: a busy machine stands still for seconds
STOPPED_S = 5.0  # a rank in the state of SIGSTOP for longer hangs
MAX_KINDS = 4096
SIZED = (DENOISING, DECODING)  # the stages whose time depends on the image


class OwnTime:
    """A monotonic clock that stands still while this process does not run, such as after SIGSTOP.

    Who reads it does so many times a second. A long gap between two readings is time in which nobody could read.

    Args:
        clock: The clock of the machine, seconds.
    """

    GAP_S = 2.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.lost_s = 0.0
        self._clock = clock
        self._read_at = clock()

    def now(self) -> float:
        """Return the time in seconds, without the gaps."""
        now = self._clock()
        if now - self._read_at > self.GAP_S:
            self.lost_s += now - self._read_at
        self._read_at = now
        return now - self.lost_s


@dataclass
class Given:
    """A request that the ranks have, with the stage that they reported last and when they did."""

    request: GenerationRequest
    stage: str
    since: float


class HangDetector:
    """The silence of the ranks about what they run, against the times of earlier steps of the same kind.

    A kind is a stage, a size, a number of frames and a number of images in a forward. A request may be silent for
    FACTOR times the slowest step of the slowest kind that runs, because requests share forwards. While others make
    progress, it may also wait for all their work: its images may have left the batch for a while.

    Args:
        hang_s: The longest silence while no step of a kind has been seen, seconds.
        longest_s: The longest silence after that, seconds.
        clock: The clock, seconds.
        keep: The share of the slowest step that is remembered at each later one of its kind; see `remembered_share`.
    """

    def __init__(
        self, hang_s: float, longest_s: float, clock: Callable[[], float] = time.monotonic, keep: float = KEEP
    ) -> None:
        self.hang_s = hang_s
        self._longest_s = longest_s
        self._keep = keep
        self._clock = clock
        self._given: dict[str, Given] = {}
        self._slowest_s: dict[Kind, float] = {}
        self._progress_at = clock()

    def on_sent(self, request: GenerationRequest) -> None:
        """Record that the ranks were given a request."""
        self._given[request.request_id] = Given(request, QUEUED, self._clock())

    def on_message(self, message: Progress | GenerationResult | Failure) -> None:
        """Record what rank 0 reports of a request."""
        given, now = self._given.get(message.request_id), self._clock()
        if given is None:
            return
        if given.stage != QUEUED and not isinstance(message, Failure):
            self._learn(kind_of(given.request, given.stage), now - given.since)
        if not isinstance(message, Progress):
            del self._given[message.request_id]
        elif message.stage != QUEUED:
            given.stage = message.stage
        given.since = now
        if not isinstance(message, Progress) or message.stage != QUEUED:
            self._progress_at = now

    def on_engine_gone(self) -> None:
        """Forget the requests of ranks that are gone; the times of their steps stay known."""
        self._given.clear()

    def check(self) -> None:
        """Raise EngineGone if the ranks hang.

        Raises:
            EngineGone: The ranks have made no progress with one of their requests for too long.
        """
        now = self._clock()
        running = [given for given in self._given.values() if given.stage != QUEUED]
        if not running:
            since = max(self._progress_at, min((given.since for given in self._given.values()), default=now))
            if now - since > self.hang_s:
                raise EngineGone(
                    f"the ranks began none of their requests for {self.hang_s:g} s (serve.hang_s): they hang"
                )
            return
        limit_s = max(self._limit_s(given) for given in running)
        work_s = sum(self._work_s(given.request) for given in running)
        for given in running:
            silent_s = now - given.since
            if silent_s > limit_s and (now - self._progress_at > limit_s or silent_s > limit_s + work_s):
                raise EngineGone(
                    f"the ranks made no progress in {given.stage} for {silent_s:.1f} s: they hang "
                    f"(at most {limit_s:.1f} s was expected; serve.hang_s is the limit of steps that were never seen)"
                )

    def _learn(self, kind: Kind, duration_s: float) -> None:
        known_s = self._keep * self._slowest_s.pop(kind, 0.0)
        self._slowest_s[kind] = max(duration_s, known_s)  # the latest kind is the last
        if len(self._slowest_s) > MAX_KINDS:
            del self._slowest_s[next(iter(self._slowest_s))]

    def _limit_s(self, given: Given) -> float:
        """Return the longest silence of a request in its stage, seconds."""
        kinds = {kind_of(given.request, given.stage)}
        if given.request.previews and given.stage == DENOISING:  # a step may end with the decoding of a preview
            kinds.add(kind_of(given.request, DECODING))
        return max(self._limit_of_kind_s(kind) for kind in kinds)

    def _limit_of_kind_s(self, kind: Kind) -> float:
        if kind in self._slowest_s:
            return max(FLOOR_S, min(self._longest_s, FACTOR * self._slowest_s[kind]))
        estimated = [
            FACTOR * slowest_s * max(1.0, pixels(kind) / pixels(known)) ** 2  # attention is quadratic in the tokens
            for known, slowest_s in self._slowest_s.items()
            if known[0] == kind[0]
        ]
        return max(self.hang_s, min(self._longest_s, max(estimated, default=0.0)))

    def _work_s(self, request: GenerationRequest) -> float:
        """Return an upper estimate of a request's whole work alone, from the slowest step of any stage, seconds."""
        slowest_s = [
            known_s for known, known_s in self._slowest_s.items() if known[1:] == kind_of(request, SIZED[0])[1:]
        ]
        images = len(request.prompts) * request.samples_per_prompt
        return images * request.steps * max(slowest_s, default=self.hang_s)


def first_step_s(config: RunConfig) -> float:
    """Return how long a step may take while none of its kind has been seen, seconds.

    It may compile the network, and a text encoder that is not kept is loaded in it.
    """
    launch = config.launch
    compiling_s = launch.collective_timeout_s if config.engine.optimize is Optimize.compile else 0.0
    loading_s = 0.0 if config.model.text.keep_loaded else launch.start_timeout_s
    return max(config.serve.hang_s, compiling_s, loading_s)


def remembered_share(config: RunConfig) -> float:
    """Return the share of the slowest step of a kind that is remembered at each later one.

    A stall of the machine is forgotten. Where a network is compiled, or a text encoder is loaded for a prompt that is
    not cached, any step may be as slow as the slowest one, and nothing is forgotten.
    """
    return KEEP if first_step_s(config) == config.serve.hang_s else 1.0


def kind_of(request: GenerationRequest, stage: str) -> Kind:
    """Return the kind of a request's steps in a stage."""
    if stage not in SIZED:
        return stage, 1, 1, 1, 1, ""
    images = min(request.batch_size, len(request.prompts) * request.samples_per_prompt)
    return stage, request.height, request.width, request.frames, images, request.solver


def pixels(kind: Kind) -> int:
    """Return the pixels of a forward."""
    return kind[1] * kind[2] * kind[3] * kind[4]


class StoppedRanks:
    """Ranks that somebody has stopped with SIGSTOP, which are found without a request.

    Args:
        clock: The clock, seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: dict[int, float] = {}

    def check(self, pids: Sequence[int]) -> None:
        """Raise EngineGone if a rank has been stopped for STOPPED_S.

        Args:
            pids: The process ids of the ranks.

        Raises:
            EngineGone: A rank is stopped.
        """
        for rank, pid in enumerate(pids):
            if not is_stopped(pid):
                self._since.pop(pid, None)
            elif self._clock() - self._since.setdefault(pid, self._clock()) > STOPPED_S:
                raise EngineGone(f"rank {rank} (process {pid}) was stopped by a signal for {STOPPED_S:g} s")
