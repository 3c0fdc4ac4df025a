"""The generation service: passes requests to the supervisor, saves their results and keeps them for download."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path

import msgspec

from harness.config.schema import RunConfig
from harness.messages import GenerationRequest
from harness.records.record import SampleRow, fingerprint
from harness.resolve.compose import to_dict
from harness.tasks.common.terminal import print_error
from harness.tasks.serve import storage
from harness.tasks.serve.housekeeping import Housekeeping
from harness.tasks.serve.image_files import PNG, ImageEncoding
from harness.tasks.serve.jobs import GenerationJob
from harness.tasks.serve.metrics import RequestMetrics
from harness.tasks.serve.openai import RequestStatus
from harness.tasks.serve.problem import Problem, as_problem
from harness.tasks.serve.supervisor import NotServing, QueueFull, Supervisor

log = logging.getLogger(__name__)


class RequestHandle:
    """One accepted request; it is settled once its samples are on disk or the reason for its failure is known.

    Args:
        job: The request's job at the supervisor.
        user: The client's name for its user, if it gave one.
        encoding: How its images are written.
        http_id: The id of the HTTP request that it came in.

    Attributes:
        rows: The saved samples, empty until the request is settled.
        problem: The error of a request that failed.
        settled: The event that is set once the request is settled.
    """

    def __init__(
        self, job: GenerationJob, user: str | None, encoding: ImageEncoding = PNG, http_id: str | None = None
    ) -> None:
        self.job = job
        self.user = user
        self.http_id = http_id
        self.encoding = encoding
        self.rows: list[SampleRow] = []
        self.problem: Problem | None = None
        self.settled = asyncio.Event()

    @property
    def id(self) -> str:
        """The request's id."""
        return self.job.request.request_id

    @property
    def is_video(self) -> bool:
        """Whether the request is for videos."""
        return self.job.request.frames > 1

    @property
    def status(self) -> RequestStatus:
        """The status: queued, running, done or failed; a request whose samples are being saved is running."""
        if not self.settled.is_set():
            return "queued" if self.job.state == "queued" else "running"
        return "done" if self.problem is None else "failed"

    @property
    def stage(self) -> str:
        """The stage of the pipeline, and after its end `saving`."""
        return self.job.stage if self.job.answer is None else "saving"


class GenerationService:
    """The interface between the HTTP routes and the supervisor.

    Args:
        config: The resolved configuration of the server.
        supervisor: The supervisor of the ranks.
        folder: The run's folder.
    """

    def __init__(self, config: RunConfig, supervisor: Supervisor, folder: Path) -> None:
        self.config = config
        self.supervisor = supervisor
        self.metrics = RequestMetrics(supervisor, lambda: not self.unready_reason)
        self.housekeeping = Housekeeping(config.serve, folder)
        self._folder = folder
        self._max_log_bytes = min(storage.MAX_REQUESTS_BYTES, (config.serve.keep_mib << 20) // 16)
        self._fingerprint = fingerprint(to_dict(config))
        self._handles: dict[str, RequestHandle] = {}
        self._background: set[asyncio.Task[None]] = set()

    @property
    def unready_reason(self) -> str:
        """Why the server generates nothing now, in one line; empty if it does."""
        supervisor = self.supervisor
        state = "" if supervisor.state == "ready" else f"{supervisor.state}: {supervisor.reason}"
        return self.housekeeping.trouble or state

    def submit(
        self,
        request: GenerationRequest,
        user: str | None,
        client: str = "",
        encoding: ImageEncoding = PNG,
        http_id: str | None = None,
    ) -> RequestHandle:
        """Queue a request.

        Args:
            request: The request for the engine.
            user: The client's name for its user.
            client: The name of the client, for turns between clients.
            encoding: How its images are written.
            http_id: The id of the HTTP request that it came in.

        Returns:
            The handle of the request.

        Raises:
            Problem: The queue is full, the server generates nothing now, or its disk takes no image.
        """
        if self.housekeeping.trouble:
            self.metrics.count("not_saved")
            raise Problem("not_saved", self.housekeeping.trouble)
        try:
            job = self.supervisor.submit(msgspec.structs.replace(request, client=client))
        except (QueueFull, NotServing) as error:
            code = "busy" if isinstance(error, QueueFull) else "not_serving"
            self.metrics.count(code)
            raise Problem(code, str(error), retry_after_s=error.retry_after_s) from error
        handle = RequestHandle(job, user, encoding, http_id)
        known = self.supervisor.jobs
        self._handles = {id: h for id, h in self._handles.items() if id in known or not h.settled.is_set()}
        self._handles[handle.id] = handle
        self._run_in_background(self._settle(handle))
        return handle

    def find(self, request_id: str) -> RequestHandle:
        """Find a request that is outstanding, or answered and still stored.

        Args:
            request_id: The request's id.

        Returns:
            The handle of the request.

        Raises:
            Problem: There is no such request.
        """
        found = self._handles.get(request_id)
        if found is None:
            raise Problem("not_found", f"there is no request {request_id}; /v1/requests lists those that are stored")
        return found

    def handles(self) -> list[RequestHandle]:
        """Return all requests, the newest first."""
        return list(reversed(self._handles.values()))

    def cancel(self, handle: RequestHandle) -> None:
        """Cancel a request: at once while it is queued, within one solver step while it runs."""
        if not handle.settled.is_set():
            self.supervisor.cancel(handle.id)

    def delete(self, handle: RequestHandle) -> None:
        """Cancel a request, and remove its files once it has ended."""
        self.cancel(handle)
        self._handles.pop(handle.id, None)
        self._run_in_background(self._remove_files(handle))

    def files(self, handle: RequestHandle) -> list[Path]:
        """List the files of a request.

        Args:
            handle: The handle of the request.

        Returns:
            One path per image or video.

        Raises:
            Problem: The request failed, or is not done yet.
        """
        if not handle.settled.is_set():
            raise Problem("not_done", f"the request is {handle.status}; try again when it is done", retry_after_s=1.0)
        if handle.problem is not None:
            raise handle.problem
        return [self._folder / row.path for row in handle.rows]

    async def close(self) -> None:
        """Wait until everything that was answered is saved."""
        await asyncio.gather(*self._background)

    def _run_in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _remove_files(self, handle: RequestHandle) -> None:
        await handle.settled.wait()
        await asyncio.to_thread(self.housekeeping.drop, handle.id)

    async def _settle(self, handle: RequestHandle) -> None:
        """Wait for the answer and save it; the request is settled afterwards, whatever happens."""
        try:
            await handle.job.wait()
            await self._save_answer(handle)
            handle.job.pixels.clear()  # they are on disk, and a server keeps many jobs in memory
            await asyncio.to_thread(self._write_log_entry, handle)
            self.metrics.count(outcome(handle))
            if handle.problem is None:
                self.metrics.observe_times(handle.job)
        except Exception:
            log.exception("request %s (%s)", handle.id, handle.http_id)
        finally:
            handle.settled.set()
            handle.job.previews.clear()

    async def _save_answer(self, handle: RequestHandle) -> None:
        try:
            await asyncio.to_thread(self._save, handle)
        except OSError as error:
            handle.problem = Problem(
                "not_saved", f"the samples could not be saved ({os_reason(error)}); free some disk space"
            )
        except Exception as error:
            log.exception("request %s (%s)", handle.id, handle.http_id)
            handle.problem = as_problem(error)

    def _save(self, handle: RequestHandle) -> None:
        """Save the samples of an answered request; runs in a thread."""
        job, fps = handle.job, self.config.model.fps
        if job.failure is not None:
            handle.problem = Problem.from_failure(job.failure)
        elif job.answer is not None:
            handle.rows = storage.save_samples(
                self._folder,
                job.request,
                job.answer.samples,
                job.pixels,
                fps,
                self._fingerprint,
                handle.encoding,
            )
            self.housekeeping.keep(handle.id, [self._folder / row.path for row in handle.rows])

    def _write_log_entry(self, handle: RequestHandle) -> None:
        """Append the request's line to requests.jsonl."""
        if handle.problem is not None and handle.job.failure is None:
            say(f"request {handle.id}: {handle.problem.message}")
        try:
            storage.append_entry(self._folder, log_entry(handle), self._max_log_bytes)
        except OSError as error:
            say(
                f"request {handle.id} has no line in {storage.REQUESTS_FILE} ({os_reason(error)}); free some disk space"
            )


def say(line: str) -> None:
    """Print a line on the terminal, which may have been closed."""
    with suppress(OSError):
        print_error(line)


def outcome(handle: RequestHandle) -> str:
    """Return ok, or the code of the error."""
    return "ok" if handle.problem is None else handle.problem.code


def os_reason(error: OSError) -> str:
    """Return the operating system's message, without the file name."""
    return error.strerror or str(error)


def log_entry(handle: RequestHandle) -> storage.RequestLogEntry:
    """Return the line of requests.jsonl for an answered request."""
    job = handle.job
    return storage.RequestLogEntry(
        request=job.request,
        outcome=outcome(handle),
        arrived=job.arrived_at,
        began=job.began_at,
        ended=job.ended_at,
        total_ms=None if job.answer is None else job.answer.total_duration_ms,
        user=handle.user,
        http_id=handle.http_id,
        error=None if handle.problem is None else handle.problem.message,
        samples=handle.rows,
    )
