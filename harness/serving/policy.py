"""The order of waiting requests: a sort key for each policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from harness.config.serve import Policy
from harness.messages import GenerationRequest


@dataclass(frozen=True)
class TrackedRequest:
    """A request and the client that waits for it; times are time.monotonic(), and `deadline` may be infinite."""

    client: bytes
    request: GenerationRequest
    arrived: float
    deadline: float


SortKey: TypeAlias = Callable[[TrackedRequest], float]


def estimated_work(request: GenerationRequest) -> float:
    """Return what a request costs up to a factor of the model: pixels times evaluations, guided ones counted twice."""
    samples = len(request.prompts) * request.samples_per_prompt
    branches = 1 if request.guidance == 1 else 2
    return request.steps * branches * samples * request.frames * request.height * request.width


def sort_key(policy: Policy) -> SortKey:
    """Return a policy's sort key: the lowest is next; among equals the first to arrive, since sorting is stable."""
    keys: dict[Policy, SortKey] = {
        Policy.fifo: lambda tracked: tracked.arrived,
        Policy.shortest: lambda tracked: estimated_work(tracked.request),
        Policy.deadline: lambda tracked: tracked.deadline,
    }
    return keys[policy]
