"""The order of waiting requests: turns between clients, and a sort key for each policy within a client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import Any, Protocol, TypeAlias

from harness.config.serve import POLICIES
from harness.messages import GenerationRequest
from harness.plugins.options import own_options
from harness.serving.turns import Turns
from schedulers.registry import imported

AGEING_S = 30.0
DEFAULT_WORK = 20 * 2 * 64 * 64.0  # of the built-in model's default request


@dataclass(frozen=True)
class TrackedRequest:
    """A request and the client that waits for it; times are time.monotonic(), and `deadline` may be infinite."""

    client: bytes
    request: GenerationRequest
    arrived: float
    deadline: float

    @property
    def turn(self) -> str:
        """The name of the client that it counts for: the request's, or the socket's."""
        return self.request.client or f"socket {self.client.hex()}"


SortKey: TypeAlias = Callable[[TrackedRequest], float]


class RequestPolicy(Protocol):
    """A request policy: the order in which a client's waiting requests begin."""

    def __call__(self, tracked: TrackedRequest, default_work: float, **options: Any) -> float:
        """Return the sort key of a request, which may not change while it waits; the lowest is next.

        Args:
            tracked: the request.
            default_work: the work of the model's default request.
            **options: the options that the plug-in declared.
        """


def evaluation_work(request: GenerationRequest) -> float:
    """Return the work of one evaluation of one image: pixels of all frames, counted twice if guided."""
    return (1 if request.guidance == 1 else 2) * float(request.frames * request.height * request.width)


def estimated_work(request: GenerationRequest) -> float:
    """Return what a request costs up to a factor of the model: pixels times evaluations, guided ones counted twice.

    A preview counts as one evaluation.
    """
    evaluations = request.steps * len(request.prompts) * request.samples_per_prompt + request.previews
    return evaluations * evaluation_work(request)


def first_come(tracked: TrackedRequest, default_work: float) -> float:
    """Order by arrival."""
    return tracked.arrived


def shortest_first(tracked: TrackedRequest, default_work: float) -> float:
    """Order by arrival and work: a request counts as if it had come AGEING_S later for each `default_work` it has.

    So only requests that arrive within AGEING_S * work / default_work seconds after it can pass it, and none waits for
    ever.

    Args:
        tracked: the request.
        default_work: the work of the model's default request.

    Returns:
        The sort key.
    """
    return tracked.arrived + AGEING_S * estimated_work(tracked.request) / default_work


def nearest_deadline(tracked: TrackedRequest, default_work: float) -> float:
    """Order by deadline."""
    return tracked.deadline


def sort_key(policy: str, default_work: float = DEFAULT_WORK, plugin: Mapping[str, object] | None = None) -> SortKey:
    """Return a policy's sort key within a client: the lowest is next, among equals the first to arrive.

    Args:
        policy: the name of a registered policy.
        default_work: the work of the model's default request.
        plugin: the options of plug-ins.

    Returns:
        The key, which does not change while a request waits.
    """
    rule: RequestPolicy = imported(POLICIES[policy])
    options = own_options(POLICIES, policy, plugin or {})
    return lambda tracked: rule(tracked, default_work, **options)


def next_request(waiting: Sequence[TrackedRequest], turns: Turns[str], key: SortKey) -> TrackedRequest | None:
    """Return the request whose turn it is: the client with the least service, and its request with the lowest key."""
    return min(waiting, key=lambda tracked: (turns.start(tracked.turn), key(tracked)), default=None)


def serving_order(waiting: Sequence[TrackedRequest], turns: Turns[str], key: SortKey) -> list[TrackedRequest]:
    """Return waiting requests in the order in which they will begin if nothing else arrives.

    Args:
        waiting: the requests, in the order of arrival.
        turns: what each client has had; it is not changed. `Turns()` if nothing is known.
        key: the sort key within a client.

    Returns:
        The same requests in order.
    """
    by_client: dict[str, list[TrackedRequest]] = {}
    for tracked in sorted(waiting, key=key)[::-1]:
        by_client.setdefault(tracked.turn, []).append(tracked)
    # the tag of a flow that waits changes only when it is served, so a heap holds them
    heads = [(turns.start(client), key(own[-1]), client) for client, own in by_client.items()]
    heapify(heads)
    order = []
    while heads:
        start, _, client = heads[0]
        own = by_client[client]
        order.append(own.pop())
        if own:
            heapreplace(heads, (start + estimated_work(order[-1].request), key(own[-1]), client))
        else:
            heappop(heads)
    return order
