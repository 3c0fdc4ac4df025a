"""The times at which requests are sent, and the requests: both are sampled by seed, or read from a trace.

In an open loop, arrivals are a renewal process whose gaps have a gamma distribution with mean 1 / rate, whatever was
answered: with burstiness 1 they are exponential, so arrivals are a Poisson process. In a closed loop, a client sends
its next request after the answer to its last one, so a slow engine gets fewer requests.
"""

from __future__ import annotations

import heapq
import math
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np

from harness.config.load import LoadConfig, Ramp
from harness.config.schema import RequestConfig, RunConfig
from harness.datasets.trace import TracedRequest, read_trace
from harness.messages import GenerationRequest
from harness.resolve.dataset import loaded_dataset
from harness.resolve.request import to_message


class ForeignRequest(msgspec.Struct, frozen=True):
    """A request to a server whose model is not known here: what is None is not sent.

    Attributes:
        request_id: Id of the request, for this client only.
        prompts: The one prompt.
        samples_per_prompt: Number of images.
        steps: Solver steps.
        guidance: Guidance scale.
        height: Height in pixels.
        width: Width in pixels.
        negative_prompt: Negative prompt.
        seed: Seed of the first image.
        timeout_s: Time limit, s.
    """

    request_id: str
    prompts: list[str]
    samples_per_prompt: int = 1
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    timeout_s: float | None = None

    @classmethod
    def of(cls, request: RequestConfig) -> ForeignRequest:
        """Return what a `request` group that was not resolved against a model says itself."""
        return cls(
            request_id="",
            prompts=list(request.prompts or []),
            samples_per_prompt=request.samples_per_prompt,
            steps=request.steps,
            guidance=request.guidance,
            height=request.height,
            width=request.width,
            negative_prompt=request.negative_prompt,
            seed=request.seed,
        )


AnyRequest = TypeVar("AnyRequest", GenerationRequest, ForeignRequest)
LoadRequest: TypeAlias = GenerationRequest | ForeignRequest


@dataclass(frozen=True)
class ArrivalRate:
    """The rate of arrivals over time: it changes from `start` to `end` within `ramp_s`, and stays there.

    Attributes:
        start: The rate at the start, requests/s.
        end: The rate after the ramp, requests/s.
        ramp_s: The length of the ramp, seconds.
        ramp: The shape of the ramp.
    """

    start: float
    end: float
    ramp_s: float
    ramp: Ramp = Ramp.linear

    @classmethod
    def of(cls, load: LoadConfig, rate: float) -> ArrivalRate:
        """Return the rate of a load, with the rate that it reaches."""
        return cls(load.ramp_from or rate, rate, load.ramp_s or load.duration_s, load.ramp)

    @property
    def in_ramp(self) -> float:
        """The expected number of arrivals within the ramp."""
        if self.start == self.end or self.ramp is Ramp.linear:
            return (self.start + self.end) / 2 * self.ramp_s
        return (self.end - self.start) * self.ramp_s / math.log(self.end / self.start)

    def time_of(self, expected: float) -> float:
        """Return the time by which that many arrivals are expected, seconds: the inverse of the integral of the rate.

        Args:
            expected: The expected number of arrivals, at least 0.
        """
        if expected >= self.in_ramp:
            return self.ramp_s + (expected - self.in_ramp) / self.end
        if self.start == self.end:
            return expected / self.end
        if self.ramp is Ramp.linear:
            slope = (self.end - self.start) / self.ramp_s
            return 2 * expected / (self.start + math.sqrt(self.start**2 + 2 * slope * expected))
        growth = math.log(self.end / self.start) / self.ramp_s
        return math.log1p(expected * growth / self.start) / growth

    def mean(self, length_s: float) -> float:
        """Return the mean rate from the start to a time, requests/s.

        Args:
            length_s: The time, seconds; more than 0.
        """
        if length_s >= self.ramp_s:
            return (self.in_ramp + (length_s - self.ramp_s) * self.end) / length_s
        part = length_s / self.ramp_s
        linear = self.start + (self.end - self.start) * part
        end = linear if self.ramp is Ramp.linear else self.start * (self.end / self.start) ** part
        return replace(self, end=end, ramp_s=length_s).in_ramp / length_s


def random_arrivals(rate: ArrivalRate, burstiness: float, random: np.random.Generator) -> Iterator[float]:
    """Sample arrival times without end.

    The gaps have a gamma distribution of the shape `burstiness` in the expected number of arrivals, so their mean
    follows the rate. With burstiness 1 and a constant rate, arrivals are a Poisson process.

    Args:
        rate: The rate over time.
        burstiness: The shape; the squared coefficient of variation of the gaps is its inverse.
        random: The random number generator.

    Yields:
        Increasing times, seconds.
    """
    expected = 0.0
    while True:
        expected += random.gamma(burstiness, 1 / burstiness)
        yield rate.time_of(expected)


class ArrivalSchedule:
    """The times at which requests are still to be sent.

    Args:
        due_times: The times that are known now, seconds since the start.
        closed_until_s: The time until which each answer is followed by a new request, seconds since the start; None
            in an open loop, where answers have no effect.
        left: The number of requests that answers may still be followed by.
    """

    def __init__(self, due_times: list[float], closed_until_s: float | None = None, left: float = math.inf) -> None:
        self._due_times = sorted(due_times)
        self._closed_until_s = closed_until_s
        self._left = left

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
        if self._closed_until_s is not None and now + wait_s < self._closed_until_s and self._left > 0:
            self._left -= 1
            heapq.heappush(self._due_times, now + wait_s)


def arrival_schedule(load: LoadConfig, length_s: float, phase: int) -> ArrivalSchedule:
    """Make the schedule of one phase; a seed and a phase always give the same one, and phases differ.

    Args:
        load: The configuration of the clients.
        length_s: The length of the phase, seconds; without effect if the number of requests is given.
        phase: The number of the phase.

    Returns:
        A new schedule.
    """
    if load.trace is not None:
        return ArrivalSchedule([request.time_s for request in traced_requests(load)])
    if load.at_once:
        return ArrivalSchedule([0.0] * (load.requests or 0))
    if load.rate is None:
        clients = load.clients if load.requests is None else min(load.clients, load.requests)
        left = math.inf if load.requests is None else load.requests - clients
        return ArrivalSchedule([0.0] * clients, length_s if load.requests is None else math.inf, left)
    random = np.random.default_rng([load.seed, phase, 0])
    times = random_arrivals(ArrivalRate.of(load, load.rate), load.burstiness, random)
    if load.requests is not None:
        return ArrivalSchedule(list(islice(times, load.requests)))
    due = []
    while (time_s := next(times)) < length_s:
        due.append(time_s)
    return ArrivalSchedule(due)


def warmup_load(load: LoadConfig) -> LoadConfig:
    """Return the clients of the warm-up: the rate at the start of a ramp, and a closed loop before other arrivals."""
    return replace(load, rate=load.ramp_from or load.rate, ramp_from=None, trace=None, at_once=False, requests=None)


def traced_requests(load: LoadConfig) -> list[TracedRequest]:
    """Return the requests of load.trace, at most load.requests of them; none without a trace.

    Raises:
        ValueError: The file cannot be used; one line says what to change.
    """
    return [] if load.trace is None else read_trace(load.trace)[: load.requests]


def generate_requests(config: RunConfig, phase: int) -> Iterator[GenerationRequest]:
    """Generate the requests of one phase to an engine of this project; see `generate`.

    Args:
        config: The resolved configuration of the run.
        phase: The number of the phase.

    Returns:
        The requests, without end.
    """
    template = msgspec.structs.replace(to_message(config.request), timeout_s=config.serve.timeout_s)
    return generate(template, config.load, phase, own_prompts(config))


def generate_foreign(config: RunConfig, phase: int) -> Iterator[ForeignRequest]:
    """Generate the requests of one phase to the server at load.url; see `generate`.

    Args:
        config: The configuration of the run.
        phase: The number of the phase.

    Returns:
        The requests, without end.
    """
    template = msgspec.structs.replace(ForeignRequest.of(config.request), timeout_s=config.serve.timeout_s)
    return generate(template, config.load, phase, own_prompts(config))


def own_prompts(config: RunConfig) -> list[TracedRequest]:
    """Return what requests say in turn: the prompts of the data set, or those of the request.

    Args:
        config: The configuration of the run.
    """
    dataset = loaded_dataset(config)
    if dataset is None:
        return [TracedRequest(0.0, prompt) for prompt in config.request.prompts or []]
    return [
        TracedRequest(0.0, each.prompt, each.negative_prompt, each.seed, None, each.height, each.width, each.line)
        for each in dataset.prompts
    ]


def generate(
    template: AnyRequest, load: LoadConfig, phase: int, prompts: Sequence[TracedRequest]
) -> Iterator[AnyRequest]:
    """Generate requests; without a trace there is no end.

    Prompts are used in turn and seeds follow one another. Steps and sizes are sampled from `load.steps` and
    `load.sizes`. What the data set says of a prompt replaces that, and what a trace says of a request replaces all.

    Args:
        template: A request with the defaults.
        load: The configuration of the clients.
        phase: The number of the phase.
        prompts: The prompts, with what the data set says of each; may be empty if a trace has a prompt in every line.

    Yields:
        One request after another, each with a new id and one prompt.
    """
    random = np.random.default_rng([load.seed, phase, 1])
    traced = traced_requests(load)
    number = 0
    while load.trace is None or number < len(traced):
        seed = None if template.seed is None else template.seed + number * template.samples_per_prompt
        steps = int(random.choice(load.steps or [0])) or template.steps
        side = int(random.choice(load.sizes)) if load.sizes else None
        default = TracedRequest(
            0.0, "", template.negative_prompt, seed, steps, side or template.height, side or template.width
        )
        listed = [prompts[number % len(prompts)]] if prompts else []
        found = merge(default, *listed, *traced[number : number + 1])
        yield msgspec.structs.replace(
            template,
            request_id=uuid.uuid4().hex,
            prompts=[found.prompt],
            seed=found.seed,
            steps=found.steps,
            height=found.height,
            width=found.width,
            negative_prompt=found.negative_prompt,
        )
        number += 1


def merge(*requests: TracedRequest) -> TracedRequest:
    """Return a request in which a later one replaces what the earlier ones say.

    Args:
        *requests: The requests; what is None in one is not said by it.
    """
    found = requests[0]
    for later in requests[1:]:
        found = replace(found, **{name: value for name, value in vars(later).items() if value is not None})
    return found
