"""What became of every request: one outcome each, `lost` until it is answered."""

from __future__ import annotations

import time
from collections.abc import Callable

from harness.messages import GenerationRequest
from harness.metrics.load import RequestRow


class RequestTracker:
    """The requests of one phase of sending.

    Args:
        clock: seconds since the phase began.
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
        """The ids of those without an answer."""
        return frozenset(self._outstanding)

    def sent(self, request: GenerationRequest, due_s: float) -> None:
        """A request goes out now, and was to go at `due_s`."""
        pictures = len(request.prompts) * request.samples_per_prompt
        row = RequestRow(
            request.request_id, due_s, self.clock(), request.steps, request.height, request.width, pictures
        )
        self._rows[request.request_id] = row
        self._outstanding.add(request.request_id)

    def began(self, request_id: str, at_s: float | None = None) -> None:
        """A request has left the queue, now or at `at_s`, if it had not before."""
        row = self._rows.get(request_id)
        if row is not None and row.began_s is None:
            row.began_s = self.clock() if at_s is None else at_s

    def answered(self, request_id: str, outcome: str, message: str = "") -> bool:
        """An answer has come; whether it was wanted: one that was not is a stray."""
        if request_id not in self._outstanding:
            self.strays += 1
            return False
        self._outstanding.remove(request_id)
        row = self._rows[request_id]
        row.ended_s, row.outcome, row.message = self.clock(), outcome, message
        return True
