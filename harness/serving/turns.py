"""Turns by work: start-time fair queueing between clients, or between the requests of one client.

Every unit of work that a flow gets has a start tag S = max(v, F), where F is the finish tag of the flow's unit before,
and a finish tag S + work. The virtual time v is the start tag of the unit in service. The unit with the lowest start
tag is next (Goyal, Vin and Cheng 1996, "Start-time fair queuing", section 2). So two flows that both have work to do
differ by one unit of each at most, whatever they ask for, and a flow that was idle has saved nothing up. Sheng et al.
2024 ("Fairness in serving large language models", arXiv:2401.00588) use such counters for continuous batching.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Flow = TypeVar("Flow", bound=Hashable)


class Turns(Generic[Flow]):
    """The tags of all flows; what lies behind the virtual time is forgotten, so it does not grow with past clients."""

    def __init__(self) -> None:
        self._virtual = 0.0
        self._finish: dict[Flow, float] = {}

    def start(self, flow: Flow) -> float:
        """Return the start tag of the flow's next unit; the lowest is next."""
        return max(self._virtual, self._finish.get(flow, 0.0))

    def begin(self, flow: Flow) -> None:
        """Advance the virtual time to the flow's next unit, which is served now."""
        self._virtual = self.start(flow)
        self._finish = {other: finish for other, finish in self._finish.items() if finish > self._virtual}

    def charge(self, flow: Flow, work: float) -> None:
        """Count work that a flow gets."""
        self._finish[flow] = self.start(flow) + work

    def settle(self) -> None:
        """Forget all flows: nothing waits and nothing runs."""
        self._virtual = max([self._virtual, *self._finish.values()])
        self._finish.clear()

    def copy(self) -> Turns[Flow]:
        """Return a copy that changes on its own."""
        other: Turns[Flow] = Turns()
        other._virtual, other._finish = self._virtual, dict(self._finish)
        return other
