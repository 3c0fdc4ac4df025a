"""The supervisor starts a server's ranks, watches them, replaces them when they die, and answers every request once.

When ranks die, each running request is answered with a Failure that gives the reason. Queued requests are kept for the
next ranks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias

import msgspec

from harness.config.schema import RunConfig
from harness.engines.torchrun import TorchrunEngine
from harness.messages import EngineInfo, GenerationRequest, MessageError
from harness.serving.faults import failure_line
from harness.serving.transport import Addresses, EngineGone
from harness.tasks.serve.engine_client import EngineClient
from harness.tasks.serve.hangs import HangDetector
from harness.tasks.serve.jobs import GenerationJob
from harness.tasks.serve.open_requests import OpenRequests

log = logging.getLogger(__name__)


class SupervisedEngine(Protocol):
    """The part of an engine that the supervisor uses."""

    @property
    def addresses(self) -> Addresses:
        """The addresses of the engine's sockets; valid once it is started."""

    def start(self, on_wait: Callable[[EngineInfo | None], None]) -> EngineInfo:
        """Start as harness.engines.protocol.Engine does; an exception of `on_wait` ends the wait."""

    def check_alive(self) -> None:
        """Raise EngineGone with the reason if the engine is known to be dead."""

    def stop(self) -> None:
        """End the engine in order and leave no process; a second call does nothing."""

    def kill(self) -> None:
        """End the engine at once, in any state, and leave no process; a second call does nothing."""


MakeSupervisedEngine: TypeAlias = Callable[[RunConfig, Path], SupervisedEngine]


class RequestRefused(RuntimeError):
    """The server accepts no request now.

    Args:
        message: The reason, in one line.
        retry_after_s: The time after which the client may try again, seconds.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(RequestRefused):
    """The queue holds as many requests as it may."""


class NotServing(RequestRefused):
    """The ranks have failed for good, or the server is stopping."""


class Supervisor:
    """The owner of a server's ranks and jobs; there is one per server, and it lives in one asyncio loop.

    Args:
        config: The resolved configuration of the server.
        folder: The run's folder, with the configuration in `config.yaml` and a folder `logs`. The logs of ranks that
            died are moved to `logs/died1`, `logs/died2` ...
        make_engine: The function that starts a set of ranks.

    Attributes:
        state: starting, ready, restarting, failed or stopping.
        reason: The reason why the server is not ready, in one line.
        info: The latest state of the ranks; None while there are none.
        restarts: The number of times that new ranks replaced dead ones.
    """

    PING_S = 1.0
    PINGS = 10  # after this many unanswered pings in a row, rank 0 counts as stopped
    WATCH_S = 0.1
    GRACE_S = 3.0  # the engine itself reports missed deadlines and ranks that do not answer; it has this long to do so
    RETRY_S = 60.0

    def __init__(self, config: RunConfig, folder: Path, make_engine: MakeSupervisedEngine = TorchrunEngine) -> None:
        self.state = "starting"
        self.reason = "the ranks are loading"
        self.info: EngineInfo | None = None
        self.restarts = 0
        self._config = config
        self._folder = folder
        self._make_engine = make_engine
        self._open = OpenRequests(config.serve)
        self._hangs = HangDetector(config.launch.collective_timeout_s)
        self._client: EngineClient | None = None
        self._load_s = 0.0
        self._deaths: deque[float] = deque()
        self._start_error: EngineGone | None = None
        self._first_start = asyncio.Event()  # the first ranks are ready, or will never be
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def jobs(self) -> dict[str, GenerationJob]:
        """The jobs by request id: all without an answer, and the last serve.max_stored_results with one."""
        return self._open.jobs

    async def start(self) -> None:
        """Start the first ranks and wait until they are ready.

        Raises:
            EngineGone: A rank died while it loaded, or was not ready in time.
        """
        self._task = asyncio.create_task(self._run())
        await self._first_start.wait()
        if self._start_error is not None:
            raise self._start_error

    async def stop(self) -> None:
        """Answer outstanding requests with a Failure of kind cancelled, and end every process.

        A second call does nothing.
        """
        if self.state != "failed":
            self._set_state("stopping", "the server is stopping")
        for job in list(self._open.outstanding.values()):
            self._cancel_on_ranks(job)
            self._open.fail(job, "cancelled", "the server was stopped")
        self._stopping.set()
        if self._task is not None:
            await self._task

    def submit(self, request: GenerationRequest) -> GenerationJob:
        """Accept a request; while ranks restart, it waits for the new ones.

        Args:
            request: The request for the engine.

        Returns:
            The job of the request.

        Raises:
            QueueFull: The queue holds serve.max_queue requests.
            NotServing: No ranks will ever run the request.
            ValueError: There is already a request with this id.
        """
        if self.state in ("failed", "stopping"):
            raise NotServing(self.reason, self.RETRY_S)
        waiting = len(self._open.queue())
        if waiting >= self._config.serve.max_queue:
            raise QueueFull(f"{waiting} requests are queued, which is serve.max_queue", self._retry_after_s())
        job = self._open.add(request)
        self._send(job)
        return job

    def cancel(self, request_id: str) -> bool:
        """Cancel a request: at once while it is queued, within one solver step while it runs.

        Args:
            request_id: The request's id.

        Returns:
            Whether there was an outstanding request with this id.
        """
        job = self._open.outstanding.get(request_id)
        if job is None:
            return False
        self._cancel_on_ranks(job)
        if job.state == "queued":
            self._open.fail(job, "cancelled", "the request was cancelled")
        return True

    async def _run(self) -> None:
        """Run one set of ranks after another until the server stops or too many have died."""
        try:
            while (error := await self._run_ranks()) is not None:
                if not self._may_restart(error):
                    return
        except Exception as error:  # no caller may wait for a supervisor that has ended
            log.exception("the supervisor failed")
            self._start_error = EngineGone(failure_line(error))
            self._set_state("failed", str(self._start_error))
        finally:
            for job in list(self._open.outstanding.values()):
                self._open.fail(job, "failed", self.reason, self.RETRY_S)
            if not self._first_start.is_set():
                self._start_error = self._start_error or EngineGone(self.reason)
                self._first_start.set()

    async def _run_ranks(self) -> EngineGone | None:
        """Run one set of ranks from its start to its end.

        Returns:
            The reason why the ranks died, or None if the server stops.
        """
        engine = self._make_engine(self._config, self._folder)
        end = engine.kill
        try:
            began = time.monotonic()
            self.info = await self._load(engine)
            self._load_s = time.monotonic() - began
            self._on_ready()
            await self._serve(engine)
            end = engine.stop
            return None
        except (EngineGone, MessageError, OSError) as error:
            gone = error if isinstance(error, EngineGone) else EngineGone(failure_line(error))
            self._on_engine_gone(gone)
            return None if self._stopping.is_set() else gone
        finally:
            await asyncio.to_thread(end)

    async def _load(self, engine: SupervisedEngine) -> EngineInfo:
        def stop_waiting(info: EngineInfo | None) -> None:
            if self._stopping.is_set():
                raise EngineGone("the server was stopped while its ranks were loading")

        loading = asyncio.ensure_future(asyncio.to_thread(engine.start, stop_waiting))
        while not loading.done():
            await asyncio.wait([loading], timeout=self.WATCH_S)
            self._expire(0.0)
        return loading.result()

    def _on_ready(self) -> None:
        """Record that new ranks are ready."""
        if self._first_start.is_set():
            self.restarts += 1
        self._first_start.set()
        if not self._stopping.is_set():
            self._set_state("ready", "")

    async def _serve(self, engine: SupervisedEngine) -> None:
        """Exchange messages with the ranks until the server stops.

        Args:
            engine: The started ranks.

        Raises:
            EngineGone: The ranks died, or do not answer any more.
        """
        client = self._client = EngineClient(engine.addresses)
        self._hangs.on_message()
        for job in list(self._open.outstanding.values()):
            self._send(job)
        duties = (self._receive(client), self._ping(client), self._watch(engine), self._stopping.wait())
        tasks = [asyncio.ensure_future(duty) for duty in duties]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._client = None
            await self._drain(client)
        for task in done:
            task.result()

    async def _drain(self, client: EngineClient) -> None:
        """Handle the answers that the ranks sent before their end."""
        try:
            while await client.has_unread():
                self._open.on_message(*await client.receive())
        finally:
            await client.close()

    async def _receive(self, client: EngineClient) -> None:
        while True:
            message, frames = await client.receive()
            self._hangs.on_message()
            self._open.on_message(message, frames)

    async def _ping(self, client: EngineClient) -> None:
        missed = 0
        while missed < self.PINGS:
            info = await client.ping(self.PING_S)
            missed = missed + 1 if info is None else 0
            if info is not None:
                self.info = info
                await asyncio.sleep(self.PING_S)
        raise EngineGone(f"rank 0 answered no ping for {self.PINGS * self.PING_S:g} s: it has stopped")

    async def _watch(self, engine: SupervisedEngine) -> None:
        while True:
            engine.check_alive()
            self._expire(self.GRACE_S)
            if self._open.sent:
                self._hangs.check(self.GRACE_S)
            await asyncio.sleep(self.WATCH_S)

    def _on_engine_gone(self, error: EngineGone) -> None:
        """Answer running requests after the ranks have died, and keep the queued ones."""
        log.error("%s", error)
        self.info = None
        if not self._stopping.is_set():
            self._set_state("restarting" if self._first_start.is_set() else "starting", str(error))
        self._open.on_engine_gone(error, self._load_s)

    def _may_restart(self, error: EngineGone) -> bool:
        """Return whether to start new ranks; if not, the state becomes failed."""
        serve, now = self._config.serve, time.monotonic()
        if not self._first_start.is_set():
            self._start_error = error
            self._set_state("failed", str(error))
            return False
        while self._deaths and now - self._deaths[0] > serve.restart_window_s:
            self._deaths.popleft()
        self._deaths.append(now)
        if len(self._deaths) > serve.restarts:
            allowed = f"serve.restarts={serve.restarts} allows in {serve.restart_window_s:g} s"
            self._set_state("failed", f"the ranks died more often than {allowed}; the last time: {error}")
            return False
        self._archive_logs()
        return True

    def _archive_logs(self) -> None:
        """Move the dead ranks' logs to a folder, so that their errors are not read as those of the next ranks."""
        logs = self._folder / "logs"
        archive = logs / f"died{len(list(logs.glob('died*'))) + 1}"
        archive.mkdir(parents=True)
        for file in (*logs.glob("rank*"), *logs.glob("launch.log")):
            file.rename(archive / file.name)

    def _send(self, job: GenerationJob) -> None:
        if self._client is None:
            return
        if not self._open.sent:
            self._hangs.on_message()
        self._open.sent[job.request.request_id] = False
        left_s = max(0.001, job.expires - time.monotonic())
        self._client.send(msgspec.structs.replace(job.request, timeout_s=left_s))

    def _cancel_on_ranks(self, job: GenerationJob) -> None:
        if self._client is not None:
            self._client.cancel(job.request.request_id)

    def _expire(self, grace_s: float) -> None:
        """Answer requests whose deadline passed more than `grace_s` seconds ago and that no rank answered."""
        now = time.monotonic()
        for job in [job for job in self._open.outstanding.values() if now > job.expires + grace_s]:
            self._cancel_on_ranks(job)
            self._open.fail(job, "expired", "the deadline passed before the request was done")

    def _retry_after_s(self) -> float:
        """Estimate when the queue has room: after the loading of ranks and one request of mean duration, seconds."""
        loading_s = self._load_s if self.state in ("starting", "restarting") else 0.0
        return loading_s + self._open.mean_generation_s()

    def _set_state(self, state: str, reason: str) -> None:
        self.state, self.reason = state, reason
