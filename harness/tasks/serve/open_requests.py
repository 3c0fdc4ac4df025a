"""The requests of a server without an answer: their order, which of them the ranks have, and which may kill ranks."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque

from harness.config.serve import ServeConfig
from harness.messages import Failure, GenerationRequest, GenerationResult, Message, Progress
from harness.serving.policy import TrackedRequest, sort_key
from harness.serving.transport import EngineGone
from harness.tasks.serve.jobs import GenerationJob

log = logging.getLogger(__name__)


class OpenRequests:
    """The jobs of a server, and what its ranks know of them.

    Args:
        serve: The server's configuration.

    Attributes:
        jobs: The jobs by request id: all without an answer, and the last serve.max_stored_results with one.
        outstanding: The jobs without an answer, in the order of arrival.
        sent: The unanswered requests of these ranks; the value says whether rank 0 has reported on each.
    """

    def __init__(self, serve: ServeConfig) -> None:
        self.jobs: dict[str, GenerationJob] = {}
        self.outstanding: dict[str, GenerationJob] = {}
        self.sent: dict[str, bool] = {}
        self._serve = serve
        self._answered: deque[str] = deque()
        self._suspects: Counter[str] = Counter()  # how often a request may have killed the ranks
        self._generation_s: deque[float] = deque(maxlen=20)

    def add(self, request: GenerationRequest) -> GenerationJob:
        """Add a request.

        Args:
            request: The request for the engine.

        Returns:
            The job of the request.

        Raises:
            ValueError: There is already a request with this id.
        """
        if request.request_id in self.jobs:
            raise ValueError(f"there is already a request {request.request_id}; give it another id")
        timeout_s = min(self._serve.timeout_s, request.timeout_s or self._serve.timeout_s)
        job = GenerationJob(request, expires=time.monotonic() + timeout_s)
        self.jobs[request.request_id] = self.outstanding[request.request_id] = job
        self._update_ahead()
        return job

    def queue(self) -> list[GenerationJob]:
        """Return the queued jobs, in the order in which the ranks will run them."""
        key = sort_key(self._serve.policy)
        queued = [job for job in self.outstanding.values() if job.state == "queued"]
        return sorted(queued, key=lambda job: key(TrackedRequest(b"", job.request, job.arrived, job.expires)))

    def mean_generation_s(self) -> float:
        """Return the mean duration of the last answered requests, 1 s if there is none."""
        return sum(self._generation_s) / len(self._generation_s) if self._generation_s else 1.0

    def on_message(self, message: Message, frames: list[bytes]) -> None:
        """Apply a message of rank 0 to its job.

        Messages about a job that was already answered (cancelled in the queue, or expired) are ignored.

        Args:
            message: The message.
            frames: All frames of the message.
        """
        if not isinstance(message, Progress | GenerationResult | Failure):
            log.warning("the engine sent %s on the request socket", type(message).__name__)
            return
        if not isinstance(message, Progress):
            self.sent.pop(message.request_id, None)
        elif message.request_id in self.sent:
            self.sent[message.request_id] = True
        job = self.outstanding.get(message.request_id)
        if job is None:
            return
        if isinstance(message, Progress):
            job.on_progress(message)
            self._update_ahead()
        elif isinstance(message, Failure):
            job.fail(message)
            self._on_answered(job)
        else:
            job.finish(message, frames)
            self._on_answered(job)

    def on_engine_gone(self, error: EngineGone, retry_after_s: float) -> None:
        """Answer running requests after the ranks have died, and keep the queued ones.

        Ranks accept requests in the order in which they were sent. So the first request on which they never reported
        may have killed them. The first time this may be chance; the second time the request is answered.

        Args:
            error: The reason why the ranks died.
            retry_after_s: The time after which clients may try again, seconds.
        """
        suspects = [request_id for request_id, reported in self.sent.items() if not reported][:1]
        self._suspects.update(suspects)
        self.sent.clear()
        for job in list(self.outstanding.values()):
            if job.state == "running":
                self.fail(job, error.kind, str(error), retry_after_s)
            elif job.request.request_id in suspects and self._suspects[job.request.request_id] > 1:
                self.fail(
                    job, "failed", f"the ranks died whenever they were given this request; the last time: {error}"
                )

    def fail(self, job: GenerationJob, kind: str, message: str, retry_after_s: float | None = None) -> None:
        """Answer a job with a Failure."""
        job.fail(Failure(job.request.request_id, kind, message, retry_after_s=retry_after_s))
        self._on_answered(job)

    def _on_answered(self, job: GenerationJob) -> None:
        """Move an answered job to the stored ones, and drop the oldest of these."""
        request_id = job.request.request_id
        del self.outstanding[request_id]
        del self._suspects[request_id]
        self._answered.append(request_id)
        while len(self._answered) > self._serve.max_stored_results:
            del self.jobs[self._answered.popleft()]
        if job.answer is not None and job.began is not None and job.ended is not None:
            self._generation_s.append(job.ended - job.began)
        self._update_ahead()

    def _update_ahead(self) -> None:
        queue = self.queue()
        for ahead, job in enumerate(queue, start=len(self.outstanding) - len(queue)):
            job.set_ahead(ahead)
