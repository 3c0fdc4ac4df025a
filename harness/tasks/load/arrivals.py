"""When requests are sent, and what they ask for: both drawn by seed, neither by what has been answered.

In an open loop arrivals are a Poisson process: the gaps are exponential with mean 1 / rate. In a closed loop a client
sends when its last answer has come, so a slow engine is asked less.
"""

from __future__ import annotations

import heapq
import uuid
from collections.abc import Iterator

import msgspec
import numpy as np

from harness.config.schema import RunConfig
from harness.config.serve import LoadConfig
from harness.messages import GenerationRequest
from harness.resolve.request import to_message


def poisson_arrivals(rate: float, length_s: float, random: np.random.Generator) -> list[float]:
    """Arrival times in [0, length_s), seconds, of `rate` a second."""
    times: list[float] = []
    now = random.exponential(1 / rate)
    while now < length_s:
        times.append(now)
        now += random.exponential(1 / rate)
    return times


class ArrivalSchedule:
    """The times at which requests are still to be sent.

    Args:
        dues: those that are known, seconds since the start.
        closed_s: until when an answer is followed by another request; None in an open loop, where none is.
    """

    def __init__(self, dues: list[float], closed_s: float | None = None) -> None:
        self._dues = sorted(dues)
        self._closed_s = closed_s

    @property
    def next_due(self) -> float | None:
        """When the next request is to be sent; None where none is known."""
        return self._dues[0] if self._dues else None

    def take(self) -> float:
        """Takes the next request's time out."""
        return heapq.heappop(self._dues)

    def answered(self, now: float, wait_s: float) -> None:
        """A client has its answer; in a closed loop it sends again after `wait_s`."""
        if self._closed_s is not None and now + wait_s < self._closed_s:
            heapq.heappush(self._dues, now + wait_s)


def schedule(load: LoadConfig, length_s: float, phase: int) -> ArrivalSchedule:
    """The schedule of one phase of sending; phases differ, and the same phase of the same seed is the same."""
    if load.rate is None:
        return ArrivalSchedule([0.0] * load.clients, length_s)
    return ArrivalSchedule(poisson_arrivals(load.rate, length_s, np.random.default_rng([load.seed, phase, 0])))


def requests(config: RunConfig, phase: int) -> Iterator[GenerationRequest]:
    """The requests of one phase, without end: the prompts in turn, seeds that follow one another, steps and sizes drawn
    from `load.steps` and `load.sizes`.
    """
    random = np.random.default_rng([config.load.seed, phase, 1])
    template = to_message(config.request)
    number = 0
    while True:
        steps = int(random.choice(config.load.steps or [template.steps]))
        side = int(random.choice(config.load.sizes)) if config.load.sizes else None
        yield msgspec.structs.replace(
            template,
            request_id=uuid.uuid4().hex,
            prompts=[template.prompts[number % len(template.prompts)]],
            seed=template.seed + number * template.samples_per_prompt,
            steps=steps,
            height=side or template.height,
            width=side or template.width,
            timeout_s=config.serve.timeout_s,
        )
        number += 1
