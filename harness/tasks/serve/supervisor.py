"""The supervisor: starts a server's ranks, watches them, starts new ones when they die, and sees that every request is
answered once.

What was being drawn when ranks died is answered with a Failure that says why; what waited is drawn by the next ranks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias

import msgspec

from harness.config.schema import RunConfig
from harness.engines.torchrun import TorchrunEngine
from harness.messages import EngineInfo, Failure, GenerationRequest, GenerationResult, Message, MessageError, Progress
from harness.serving.faults import failure_line
from harness.serving.policy import Accepted, key_of
from harness.serving.transport import Addresses, EngineGone
from harness.tasks.serve.engine_client import Link
from harness.tasks.serve.jobs import GenerationJob

log = logging.getLogger(__name__)


class Ranks(Protocol):
    """What the supervisor needs of an engine."""

    @property
    def addresses(self) -> Addresses:
        """Where it listens, once it is started."""

    def start(self, on_wait: Callable[[EngineInfo | None], None]) -> EngineInfo:
        """As harness.engines.protocol.Engine's; what `on_wait` raises ends the wait."""

    def check_alive(self) -> None:
        """Raises EngineGone with the reason once the engine is known to be dead."""

    def stop(self) -> None:
        """Ends it in order; no process of it is left. Harmless when repeated."""

    def kill(self) -> None:
        """Ends it at once, whatever state it is in; no process of it is left. Harmless when repeated."""


MakeRanks: TypeAlias = Callable[[RunConfig, Path], Ranks]


class Refused(RuntimeError):
    """The server takes no request now.

    Args:
        message: why, in one line.
        retry_after_s: when to try again.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Refused):
    """As many requests wait as may wait."""


class NotServing(Refused):
    """The ranks are gone for good, or the server stops."""


class Supervisor:
    """One a server; it lives in one asyncio loop.

    Args:
        config: the resolved configuration.
        folder: the run's, with the configuration in `config.yaml` and a folder `logs`; what ranks that died have left
            there is moved to `logs/died1`, `logs/died2` ...
        make_engine: makes fresh ranks.

    Attributes:
        state: starting, ready, restarting, failed or stopping.
        reason: why it is not ready, in one line.
        info: what the ranks answered last; None where there are none.
        restarts: how often new ranks have taken over.
        jobs: by request id: those without an answer, and the last serve.keep with one.
    """

    PING_S = 1.0
    PINGS = 10  # unanswered in a row: rank 0 has stopped
    WATCH_S = 0.1
    GRACE_S = 3.0  # the engine speaks first, of deadlines and of ranks that do not answer one another
    RETRY_S = 60.0

    def __init__(self, config: RunConfig, folder: Path, make_engine: MakeRanks = TorchrunEngine) -> None:
        self.state = "starting"
        self.reason = "the ranks are loading"
        self.info: EngineInfo | None = None
        self.restarts = 0
        self.jobs: dict[str, GenerationJob] = {}
        self._config = config
        self._folder = folder
        self._make_engine = make_engine
        self._outstanding: dict[str, GenerationJob] = {}  # in the order of their arrival
        self._answered: deque[str] = deque()
        self._link: Link | None = None
        self._sent: dict[str, bool] = {}  # what these ranks have not answered, and whether they said anything of it
        self._suspects: Counter[str] = Counter()
        self._last_word = 0.0
        self._start_s = 0.0
        self._drawn_s: deque[float] = deque(maxlen=20)
        self._deaths: deque[float] = deque()
        self._gone: EngineGone | None = None
        self._first = asyncio.Event()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns once the first ranks are ready.

        Raises:
            EngineGone: a rank died while it loaded, or was not ready in time.
        """
        self._task = asyncio.create_task(self._run())
        await self._first.wait()
        if self._gone is not None:
            raise self._gone

    async def stop(self) -> None:
        """Answers what is outstanding with a Failure of kind cancelled, and ends every process.

        Harmless when repeated.
        """
        if self.state != "failed":
            self._set("stopping", "the server stops")
        for job in list(self._outstanding.values()):
            self._cancel_drawing(job)
            self._fail(job, "cancelled", "the server was stopped")
        self._stopping.set()
        if self._task is not None:
            await self._task

    def submit(self, request: GenerationRequest) -> GenerationJob:
        """Takes a request; while ranks are started again, it waits for them.

        Raises:
            Busy: too many wait.
            NotServing: it would never be drawn.
            ValueError: a request of that id is here already.
        """
        if self.state in ("failed", "stopping"):
            raise NotServing(self.reason, self.RETRY_S)
        if request.request_id in self.jobs:
            raise ValueError(f"a request {request.request_id} is here already; give it another id")
        waiting = len(self._queue())
        if waiting >= self._config.serve.max_queue:
            raise QueueFull(f"{waiting} requests wait, which is serve.max_queue", self._retry_after_s())
        timeout_s = min(self._config.serve.timeout_s, request.timeout_s or self._config.serve.timeout_s)
        job = GenerationJob(request, expires=time.monotonic() + timeout_s)
        self.jobs[request.request_id] = self._outstanding[request.request_id] = job
        self._count()
        self._send(job)
        return job

    def cancel(self, request_id: str) -> bool:
        """Stops a request: at once where it waits, within a solver step where it is drawn; whether there was one."""
        job = self._outstanding.get(request_id)
        if job is None:
            return False
        self._cancel_drawing(job)
        if job.state == "queued":
            self._fail(job, "cancelled", "the request was cancelled")
        return True

    async def _run(self) -> None:
        """From the first ranks to the last."""
        try:
            while (gone := await self._live()) is not None:
                if not self._may_restart(gone):
                    return
        except Exception as error:  # nobody shall wait for a supervisor that is gone
            log.exception("the supervisor failed")
            self._gone = EngineGone(failure_line(error))
            self._set("failed", str(self._gone))
        finally:
            for job in list(self._outstanding.values()):
                self._fail(job, "failed", self.reason, self.RETRY_S)
            if not self._first.is_set():
                self._gone = self._gone or EngineGone(self.reason)
                self._first.set()

    async def _live(self) -> EngineGone | None:
        """One set of ranks, from its start to its end: why it died, or None where the server stops."""
        engine = self._make_engine(self._config, self._folder)
        end = engine.kill
        try:
            began = time.monotonic()
            self.info = await self._load(engine)
            self._start_s = time.monotonic() - began
            self._take_over()
            await self._serve(engine)
            end = engine.stop
            return None
        except (EngineGone, MessageError, OSError) as error:
            gone = error if isinstance(error, EngineGone) else EngineGone(failure_line(error))
            self._lost(gone)
            return None if self._stopping.is_set() else gone
        finally:
            await asyncio.to_thread(end)

    async def _load(self, engine: Ranks) -> EngineInfo:
        def give_up(info: EngineInfo | None) -> None:
            if self._stopping.is_set():
                raise EngineGone("the server was stopped while its ranks were loading")

        loading = asyncio.ensure_future(asyncio.to_thread(engine.start, give_up))
        while not loading.done():
            await asyncio.wait([loading], timeout=self.WATCH_S)
            self._expire(0.0)
        return loading.result()

    def _take_over(self) -> None:
        """The new ranks are ready."""
        if self._first.is_set():
            self.restarts += 1
        self._first.set()
        if not self._stopping.is_set():
            self._set("ready", "")

    async def _serve(self, engine: Ranks) -> None:
        """Until the server stops.

        Raises:
            EngineGone: the ranks died, or do not answer any more.
        """
        link = self._link = Link(engine.addresses)
        self._last_word = time.monotonic()
        for job in list(self._outstanding.values()):
            self._send(job)
        duties = (self._listen(link), self._ping(link), self._watch(engine), self._stopping.wait())
        tasks = [asyncio.ensure_future(duty) for duty in duties]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._link = None
            await self._drain(link)
        for task in done:
            task.result()

    async def _drain(self, link: Link) -> None:
        """Takes the answers that were given before the end."""
        try:
            while await link.left():
                self._hear(*await link.receive())
        finally:
            await link.close()

    async def _listen(self, link: Link) -> None:
        while True:
            self._hear(*await link.receive())

    async def _ping(self, link: Link) -> None:
        missed = 0
        while missed < self.PINGS:
            info = await link.ping(self.PING_S)
            missed = missed + 1 if info is None else 0
            if info is not None:
                self.info = info
                await asyncio.sleep(self.PING_S)
        raise EngineGone(f"rank 0 answered no ping for {self.PINGS * self.PING_S:g} s: it has stopped")

    async def _watch(self, engine: Ranks) -> None:
        while True:
            engine.check_alive()
            self._expire(self.GRACE_S)
            patience_s = self._config.launch.collective_timeout_s
            if self._sent and time.monotonic() - self._last_word > patience_s + self.GRACE_S:
                raise EngineGone(
                    f"rank 0 reported nothing of its requests for {patience_s:g} s: a rank has stopped, or is slower "
                    "than launch.collective_timeout_s allows"
                )
            await asyncio.sleep(self.WATCH_S)

    def _hear(self, message: Message, frames: list[bytes]) -> None:
        """What rank 0 says of a request. What it says of one that was answered already (it was cancelled while it
        waited, or expired) is passed over."""
        if not isinstance(message, Progress | GenerationResult | Failure):
            log.warning("the engine said %s on the socket of requests", type(message).__name__)
            return
        self._last_word = time.monotonic()
        if not isinstance(message, Progress):
            self._sent.pop(message.request_id, None)
        elif message.request_id in self._sent:
            self._sent[message.request_id] = True
        job = self._outstanding.get(message.request_id)
        if job is None:
            return
        if isinstance(message, Progress):
            job.on_progress(message)
            self._count()
        elif isinstance(message, Failure):
            job.fail(message)
            self._forget(job)
        else:
            job.finish(message, frames)
            self._forget(job)

    def _lost(self, gone: EngineGone) -> None:
        """The ranks are gone: what they drew is answered, what waited is kept.

        They take requests in the order that these were sent, so the first of which they said nothing may have been
        their end. Once may be chance; the second time it is answered.
        """
        log.error("%s", gone)
        self.info = None
        suspects = [request_id for request_id, heard in self._sent.items() if not heard][:1]
        self._suspects.update(suspects)
        self._sent.clear()
        if not self._stopping.is_set():
            self._set("restarting" if self._first.is_set() else "starting", str(gone))
        for job in list(self._outstanding.values()):
            if job.state == "running":
                self._fail(job, gone.kind, str(gone), self._start_s)
            elif job.request.request_id in suspects and self._suspects[job.request.request_id] > 1:
                self._fail(
                    job, "failed", f"the ranks died whenever they were given this request; the last time: {gone}"
                )

    def _may_restart(self, gone: EngineGone) -> bool:
        """Whether new ranks shall be started; else the state is failed."""
        serve, now = self._config.serve, time.monotonic()
        if not self._first.is_set():
            self._gone = gone
            self._set("failed", str(gone))
            return False
        while self._deaths and now - self._deaths[0] > serve.restart_window_s:
            self._deaths.popleft()
        self._deaths.append(now)
        if len(self._deaths) > serve.restarts:
            allowed = f"serve.restarts={serve.restarts} allows in {serve.restart_window_s:g} s"
            self._set("failed", f"the ranks died more often than {allowed}; the last time: {gone}")
            return False
        self._set_aside()
        return True

    def _set_aside(self) -> None:
        """Moves the dead ranks' logs away: they are kept, and their errors are not read as those of the next."""
        logs = self._folder / "logs"
        kept = logs / f"died{len(list(logs.glob('died*'))) + 1}"
        kept.mkdir(parents=True)
        for left in (*logs.glob("rank*"), *logs.glob("launch.log")):
            left.rename(kept / left.name)

    def _send(self, job: GenerationJob) -> None:
        if self._link is None:
            return
        if not self._sent:
            self._last_word = time.monotonic()
        self._sent[job.request.request_id] = False
        left_s = max(0.001, job.expires - time.monotonic())
        self._link.send(msgspec.structs.replace(job.request, timeout_s=left_s))

    def _cancel_drawing(self, job: GenerationJob) -> None:
        if self._link is not None:
            self._link.cancel(job.request.request_id)

    def _expire(self, grace_s: float) -> None:
        """Answers what has waited too long, where no rank does."""
        now = time.monotonic()
        for job in [job for job in self._outstanding.values() if now > job.expires + grace_s]:
            self._cancel_drawing(job)
            self._fail(job, "expired", "its deadline passed before it was drawn")

    def _fail(self, job: GenerationJob, kind: str, message: str, retry_after_s: float | None = None) -> None:
        job.fail(Failure(job.request.request_id, kind, message, retry_after_s=retry_after_s))
        self._forget(job)

    def _forget(self, job: GenerationJob) -> None:
        """A job is answered."""
        request_id = job.request.request_id
        del self._outstanding[request_id]
        del self._suspects[request_id]
        self._answered.append(request_id)
        while len(self._answered) > self._config.serve.keep:
            del self.jobs[self._answered.popleft()]
        if job.answer is not None and job.began is not None and job.ended is not None:
            self._drawn_s.append(job.ended - job.began)
        self._count()

    def _count(self) -> None:
        queue = self._queue()
        for ahead, job in enumerate(queue, start=len(self._outstanding) - len(queue)):
            job.move(ahead)

    def _queue(self) -> list[GenerationJob]:
        """What waits, in the order in which the ranks take it."""
        key = key_of(self._config.serve.policy)
        queued = [job for job in self._outstanding.values() if job.state == "queued"]
        return sorted(queued, key=lambda job: key(Accepted(b"", job.request, job.arrived, job.expires)))

    def _retry_after_s(self) -> float:
        """A place is free once a request has been drawn; the mean of the last ones says when."""
        loading_s = self._start_s if self.state in ("starting", "restarting") else 0.0
        return loading_s + (sum(self._drawn_s) / len(self._drawn_s) if self._drawn_s else 1.0)

    def _set(self, state: str, reason: str) -> None:
        self.state, self.reason = state, reason
