"""Track every request of a load: each has exactly one outcome, which is `lost` until it is answered."""

from __future__ import annotations

import time
from collections.abc import Callable

from harness.metrics.load import INVALID, RequestRow
from harness.tasks.load.arrivals import LoadRequest


class RequestTracker:
    """The requests of one phase of a load, such as the warm-up.

    Args:
        clock: A function that returns the seconds since the start of the phase; the default starts now.

    Attributes:
        strays: The number of answers to requests that were not outstanding.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        began = time.perf_counter()
        self.clock = clock or (lambda: time.perf_counter() - began)
        self.strays = 0
        self._rows: dict[str, RequestRow] = {}
        self._outstanding: set[str] = set()

    @property
    def rows(self) -> list[RequestRow]:
        """Every request, in the order of sending."""
        return list(self._rows.values())

    @property
    def outstanding(self) -> frozenset[str]:
        """The ids of the requests without an answer."""
        return frozenset(self._outstanding)

    def record_sent(self, request: LoadRequest, due_s: float) -> None:
        """Record that a request is sent now.

        Args:
            request: The request.
            due_s: The time at which it was due, seconds since the start of the phase.
        """
        images = len(request.prompts) * request.samples_per_prompt
        row = RequestRow(request.request_id, due_s, self.clock(), request.steps, request.height, request.width, images)
        self._rows[request.request_id] = row
        self._outstanding.add(request.request_id)

    def record_started(self, request_id: str, at_s: float | None = None) -> None:
        """Record that a request left the queue; only the first call for a request counts.

        Args:
            request_id: The request's id.
            at_s: The time at which it left the queue, seconds since the start of the phase; the default is now.
        """
        row = self._rows.get(request_id)
        if row is not None and row.began_s is None:
            row.began_s = self.clock() if at_s is None else at_s

    def record_answer(self, request_id: str, outcome: str, message: str = "") -> bool:
        """Record an answer; one to a request that is not outstanding counts as a stray.

        Args:
            request_id: The request's id.
            outcome: ok, or the kind of the failure.
            message: The message of the failure.

        Returns:
            Whether the request was outstanding.
        """
        if request_id not in self._outstanding:
            self.strays += 1
            return False
        self._outstanding.remove(request_id)
        row = self._rows[request_id]
        row.ended_s, row.outcome, row.message = self.clock(), outcome, message
        return True

    def record_size(self, request_id: str, size: str) -> None:
        """Record the size of an answer's images, after all of them were decoded.

        Args:
            request_id: The request's id.
            size: The size, such as `512x768`, width first.
        """
        self._rows[request_id].size = size

    def record_invalid(self, request_id: str, message: str) -> None:
        """Record that an answer, whose time is recorded, is not the images that were requested.

        Args:
            request_id: The request's id.
            message: What it is instead.
        """
        row = self._rows[request_id]
        row.outcome, row.message = INVALID, message
