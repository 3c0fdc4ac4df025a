"""The times at which requests are sent, and the requests: both are sampled by seed.

In an open loop, arrivals are a Poisson process: the gaps are exponential with mean 1 / rate, whatever was answered. In
a closed loop, a client sends its next request after the answer to its last one, so a slow engine gets fewer requests.
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
    """Sample the arrival times of a Poisson process.

    Args:
        rate: The mean number of arrivals per second.
        length_s: The length of the interval, seconds.
        random: The random number generator.

    Returns:
        Increasing times in [0, length_s), seconds.
    """
    times: list[float] = []
    now = random.exponential(1 / rate)
    while now < length_s:
        times.append(now)
        now += random.exponential(1 / rate)
    return times


class ArrivalSchedule:
    """The times at which requests are still to be sent.

    Args:
        due_times: The times that are known now, seconds since the start.
        closed_until_s: The time until which each answer is followed by a new request, seconds since the start; None
            in an open loop, where answers have no effect.
    """

    def __init__(self, due_times: list[float], closed_until_s: float | None = None) -> None:
        self._due_times = sorted(due_times)
        self._closed_until_s = closed_until_s

    @property
    def next_due(self) -> float | None:
        """The time of the next request, or None if no time is known."""
        return self._due_times[0] if self._due_times else None

    def pop(self) -> float:
        """Remove and return the time of the next request."""
        return heapq.heappop(self._due_times)

    def on_answer(self, now: float, wait_s: float) -> None:
        """Schedule a client's next request after its answer; this has an effect in a closed loop only.

        Args:
            now: The time of the answer, seconds since the start.
            wait_s: The time that the client waits before it sends again, seconds.
        """
        if self._closed_until_s is not None and now + wait_s < self._closed_until_s:
            heapq.heappush(self._due_times, now + wait_s)


def arrival_schedule(load: LoadConfig, length_s: float, phase: int) -> ArrivalSchedule:
    """Make the schedule of one phase; a seed and a phase always give the same one, and phases differ.

    Args:
        load: The configuration of the clients.
        length_s: The length of the phase, seconds.
        phase: The number of the phase.

    Returns:
        A new schedule.
    """
    if load.rate is None:
        return ArrivalSchedule([0.0] * load.clients, length_s)
    return ArrivalSchedule(poisson_arrivals(load.rate, length_s, np.random.default_rng([load.seed, phase, 0])))


def generate_requests(config: RunConfig, phase: int) -> Iterator[GenerationRequest]:
    """Generate the requests of one phase without end.

    Prompts are used in turn and seeds follow one another. Steps and sizes are sampled from `load.steps` and
    `load.sizes`.

    Args:
        config: The resolved configuration of the run.
        phase: The number of the phase.

    Yields:
        One request after another, each with a new id.
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
