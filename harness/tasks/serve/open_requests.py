"""The requests of a server without an answer: their order, which of them the ranks have, and which may kill ranks."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping

from harness.config.serve import ServeConfig
from harness.messages import Failure, GenerationRequest, GenerationResult, MessageError, Progress
from harness.serving.policy import TrackedRequest, sort_key
from harness.serving.transport import EngineGone
from harness.tasks.serve.jobs import GenerationJob


class OpenRequests:
    """The jobs of a server, and what its ranks know of them.

    Ranks that die may have been killed by a request. Every request that they were generating is then a suspect, and is
    generated again by the next ranks: one suspect at a time, alone, before everything else. A suspect that is answered
    is none any more. One that was alone with ranks that died is answered with a Failure, and no other request is.

    A rank that somebody kills says nothing about its requests, so they are no suspects, and go on together. Those that
    had ranks killed before are, whoever killed them.

    Args:
        serve: The server's configuration.
        plugin: The options of plug-ins.

    Attributes:
        jobs: The jobs by request id: all without an answer, and the last serve.max_stored_results with one.
        outstanding: The jobs without an answer, in the order of arrival.
        sent: The requests that these ranks have not answered; the value says whether rank 0 has reported on each.
    """

    def __init__(self, serve: ServeConfig, plugin: Mapping[str, object] | None = None) -> None:
        self.jobs: dict[str, GenerationJob] = {}
        self.outstanding: dict[str, GenerationJob] = {}
        self.sent: dict[str, bool] = {}
        self._serve = serve
        self._key = sort_key(serve.policy, plugin=plugin)
        self._answered: deque[str] = deque()
        self._suspects: set[str] = set()
        self._alone = False  # the one request that was sent is a suspect
        self._deaths: Counter[str] = Counter()  # how many ranks died while they had an open request
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
            raise ValueError(
                f"there is already a request {request.request_id}: the new one is refused and the first goes on; "
                "give the new one another id"
            )
        timeout_s = min(self._serve.timeout_s, request.timeout_s or self._serve.timeout_s)
        job = GenerationJob(request, expires=time.monotonic() + timeout_s)
        self.jobs[request.request_id] = self.outstanding[request.request_id] = job
        self._update_ahead()
        return job

    def queue(self) -> list[GenerationJob]:
        """Return the queued jobs, in the order in which the ranks will run them: suspects come first."""

        def place(job: GenerationJob) -> tuple[bool, float]:
            tracked = TrackedRequest(b"", job.request, job.arrived, job.expires)
            return job.request.request_id not in self._suspects, self._key(tracked)

        return sorted((job for job in self.outstanding.values() if job.state == "queued"), key=place)

    def to_send(self) -> list[GenerationJob]:
        """Return the jobs that the ranks may be given now; the caller sends all of them and calls `on_sent`.

        The ranks' own queue has no room for more than serve.max_queue either, and would refuse the rest. It also has
        requests that were answered here, such as cancelled ones, until the ranks know.
        """
        waiting = [job for request_id, job in self.outstanding.items() if request_id not in self.sent]
        if not waiting:
            return []
        suspects = [job for job in waiting if job.request.request_id in self._suspects]
        if self._alone or (suspects and self.sent):
            return []
        running = sum(name in self.outstanding and self.outstanding[name].state == "running" for name in self.sent)
        return suspects[:1] or waiting[: max(0, self._serve.max_queue - len(self.sent) + running)]

    def on_sent(self, job: GenerationJob) -> None:
        """Record that the ranks were given a request."""
        self.sent[job.request.request_id] = False
        self._alone = job.request.request_id in self._suspects

    def mean_generation_s(self) -> float:
        """Return the mean duration of the last answered requests, 1 s if there is none."""
        return sum(self._generation_s) / len(self._generation_s) if self._generation_s else 1.0

    def on_message(self, message: Progress | GenerationResult | Failure, frames: list[bytes]) -> None:
        """Apply a message of rank 0 to its job.

        Messages about a job that was already answered (cancelled in the queue, or expired) are ignored.

        Args:
            message: The message.
            frames: All frames of the message.
        """
        if not isinstance(message, Progress):
            self.sent.pop(message.request_id, None)
            self._alone = self._alone and bool(self.sent)
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
            self._finish(job, message, frames)

    def on_engine_gone(self, error: EngineGone) -> int:
        """Put what the ranks had back into the queue after they have died, and answer the request that killed them.

        Args:
            error: The reason why the ranks died.

        Returns:
            The deaths that the request explains which was found to kill ranks; 0 if none was found.
        """
        found = [job for request_id, job in self.outstanding.items() if request_id in self.sent]
        guilty = found[0] if self._alone and found else None
        self._deaths.update(job.request.request_id for job in found)
        explained = 0 if guilty is None else self._deaths[guilty.request.request_id]
        if guilty is None:
            suspects = [job for job in found if self._deaths[job.request.request_id] > 1]
            suspects += [] if error.from_outside else self._likely(found)
            self._suspects.update(job.request.request_id for job in suspects)
        self.forget_sent()
        for job in found:
            if job.cancelling:
                self.fail(job, "cancelled", "the request was cancelled")
        if guilty is not None and not guilty.answered:
            times = "twice" if explained == 2 else f"{explained} times"
            line = f"the ranks died {times} with this request, the last time with no other; change the request"
            self.fail(guilty, error.kind, f"{line} ({error})")
        return explained

    def forget_sent(self) -> None:
        """Put what the ranks had back into the queue: there are no such ranks any more."""
        self.sent.clear()
        self._alone = False
        for job in self.outstanding.values():
            if job.state == "running":
                job.queue_again()
        self._update_ahead()

    def _likely(self, found: list[GenerationJob]) -> list[GenerationJob]:
        """Return the requests that may have killed the ranks.

        These are the ones that ran, or the next one if none did: the report of its beginning may be lost. Ranks accept
        requests in the order in which they were sent, so the first one without a report may have killed them too.
        """
        ran = [job for job in found if job.state == "running"]
        first = ran or [job for job in self.queue() if job in found][:1]
        unreported = [job for job in found if not self.sent[job.request.request_id]][:1]
        return [*first, *unreported]

    def _finish(self, job: GenerationJob, result: GenerationResult, frames: list[bytes]) -> None:
        try:
            job.finish(result, frames)
        except MessageError as error:
            self.fail(job, "failed", f"the answer of the ranks cannot be read ({error})")
        else:
            self._on_answered(job)

    def fail(self, job: GenerationJob, kind: str, message: str, retry_after_s: float | None = None) -> None:
        """Answer a job with a Failure."""
        job.fail(Failure(job.request.request_id, kind, message, retry_after_s=retry_after_s))
        self._on_answered(job)

    def _on_answered(self, job: GenerationJob) -> None:
        """Move an answered job to the stored ones, and drop the oldest of these."""
        request_id = job.request.request_id
        del self.outstanding[request_id]
        del self._deaths[request_id]
        self._suspects.discard(request_id)
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
