"""Which waiting request is next: a key to sort by, for each policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from harness.config.serve import Policy
from harness.messages import GenerationRequest


@dataclass(frozen=True)
class Accepted:
    """A request and the client that waits for it; times are of time.monotonic(), `deadline` may be infinite."""

    client: bytes
    request: GenerationRequest
    arrived: float
    deadline: float


Key: TypeAlias = Callable[[Accepted], float]


def work(request: GenerationRequest) -> float:
    """What a request costs, up to a factor of the model: pixels times evaluations, a guided one counted twice."""
    pictures = len(request.prompts) * request.samples_per_prompt
    branches = 1 if request.guidance == 1 else 2
    return request.steps * branches * pictures * request.frames * request.height * request.width


def key_of(policy: Policy) -> Key:
    """The lowest is next; among equals the first that came (sorting keeps their order)."""
    keys: dict[Policy, Key] = {
        Policy.fifo: lambda accepted: accepted.arrived,
        Policy.shortest: lambda accepted: work(accepted.request),
        Policy.deadline: lambda accepted: accepted.deadline,
    }
    return keys[policy]
