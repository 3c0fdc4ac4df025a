"""What the machine does: seconds per unit of work, learned from forwards, and the requests that it cannot finish."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from harness.messages import GenerationRequest
from harness.serving.policy import evaluation_work

KEEP = 0.8  # the weight of what was known, in the moving average
SLACKEN = 1.02  # the fastest time is forgotten by this factor at each forward
MOST_SIZES = 64
FORGET_S = 300.0  # a size that was not seen for so long refuses nothing: the machine may have been busy then
ALWAYS_TAKEN = 16  # an image with this many times the work of the default one is taken, however slow the machine is
CERTAIN = 3  # forwards of a size after which its time refuses something; a first one may compile


@dataclass
class SizeSpeed:
    """What is known of one size, in seconds per unit of work.

    Attributes:
        mean: the moving average.
        fastest: the fastest of late.
        count: the number of forwards.
        seen: the time of the last one, time.monotonic().
    """

    mean: float
    fastest: float
    count: int
    seen: float


class SpeedEstimate:
    """Seconds per unit of work, by the work of one evaluation of one image, since small images use the machine less."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[float, SizeSpeed] = OrderedDict()

    def observe(self, size: float, work: float, seconds: float) -> None:
        """Learn from a forward.

        Args:
            size: the work of one evaluation of one image in it.
            work: the work of the whole forward.
            seconds: the time of the forward, s.
        """
        new, now = seconds / work, time.monotonic()
        known = self._sizes.pop(size, SizeSpeed(new, new, 0, now))
        mean, fastest = KEEP * known.mean + (1 - KEEP) * new, min(new, SLACKEN * known.fastest)
        self._sizes[size] = SizeSpeed(mean, fastest, known.count + 1, now)
        if len(self._sizes) > MOST_SIZES:
            self._sizes.popitem(last=False)

    def expected_s(self, size: float, work: float) -> float | None:
        """Return the time that work of a size usually takes, s; None while nothing is known."""
        known = self._sizes.get(size)
        if known is not None:
            return work * known.mean
        return work * min(each.mean for each in self._sizes.values()) if self._sizes else None

    def least_s(self, size: float, work: float) -> float | None:
        """Return the time that work of a size takes at least, s, by the forwards of late; None if there are none.

        A size that is not known counts as the fastest one that is.
        """
        now = time.monotonic()
        known = {s: x.fastest for s, x in self._sizes.items() if x.count >= CERTAIN and now - x.seen < FORGET_S}
        return work * known.get(size, min(known.values())) if known else None


class Capacity:
    """Refuses requests that the machine cannot finish in their time, as far as its speed is known.

    Args:
        evaluations: returns the network evaluations of one image of a request.
        replicas: the number of replicas, which generate the images of a request at the same time.
        max_evaluation_s: the longest time of one evaluation of one image that is accepted, s. Nothing else that the
            replica generates advances in that time.
        default_work: the work of one evaluation of an image of the model's default request.

    Attributes:
        speed: what is known of the machine.
    """

    def __init__(
        self,
        evaluations: Callable[[GenerationRequest], int],
        replicas: int = 1,
        max_evaluation_s: float = math.inf,
        default_work: float = 0.0,
    ) -> None:
        self.speed = SpeedEstimate()
        self._evaluations = evaluations
        self._replicas = replicas
        self._max_evaluation_s = max_evaluation_s
        self._always_taken = ALWAYS_TAKEN * default_work

    def check(self, request: GenerationRequest, timeout_s: float) -> None:
        """Refuse a request that cannot be finished.

        Args:
            request: a request that the pipeline can generate.
            timeout_s: the time that it has, s.

        Raises:
            ValueError: it needs more time; the message says how much, and what to lower.
        """
        size, images = evaluation_work(request), len(request.prompts) * request.samples_per_prompt
        evaluation_s = self.speed.least_s(size, size)
        if evaluation_s is None:
            return
        if evaluation_s > self._max_evaluation_s and size > self._always_taken:
            raise ValueError(
                f"one evaluation of such an image takes about {evaluation_s:.2g} s here, this server's limit is "
                f"serve.max_evaluation_s={self._max_evaluation_s:g}; lower the size"
            )
        rounds = math.ceil(images / self._replicas)
        needed_s = evaluation_s * (
            self._evaluations(request) * rounds + request.previews
        )  # one counts as an evaluation
        if needed_s > timeout_s:
            raise ValueError(
                f"needs about {needed_s:.3g} s here, its timeout is {timeout_s:.3g} s; lower steps, size or n"
            )
