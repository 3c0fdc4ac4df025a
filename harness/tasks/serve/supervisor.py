"""The supervisor starts a server's ranks, watches them, replaces them when they die, and answers every request once.

When ranks die, the next ones generate what they had again. Only a request that killed ranks twice is answered with a
Failure. A trouble of the server itself, such as a full disk, is logged and tried again; it is nobody's death.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

import msgspec

from harness.config.schema import RunConfig
from harness.engines.torchrun import TorchrunEngine
from harness.messages import EngineInfo, GenerationRequest, GenerationResult
from harness.serving.faults import failure_line
from harness.serving.transport import EngineGone
from harness.tasks.serve.hangs import HangDetector, OwnTime, first_step_s, remembered_share
from harness.tasks.serve.jobs import GenerationJob
from harness.tasks.serve.open_requests import OpenRequests
from harness.tasks.serve.ranks import MakeSupervisedEngine, RankSession, Report, SupervisedEngine, Watch, end
from harness.tasks.serve.restarts import Deaths, TroubleLog, oom_kills, pause_after

log = logging.getLogger(__name__)


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
    """The ranks have died too often, or the server is stopping."""


class Supervisor:
    """The owner of a server's ranks and jobs; there is one per server, and it lives in one asyncio loop.

    Args:
        config: The resolved configuration of the server.
        folder: The run's folder, with the configuration in `config.yaml` and a folder `logs`. The logs of ranks that
            died are moved to `logs/died1`, `logs/died2` ...
        make_engine: The function that starts a set of ranks.

    Attributes:
        state: starting, ready, restarting, failed (the ranks died too often, and are tried again) or stopping.
        reason: The reason why the server is not ready, in one line.
        restarts: The number of times that new ranks replaced dead ones.
        gave_up: The event that is set when the ranks have failed and serve.exit_when_failed says to end.
    """

    WATCH_S = 0.05
    GRACE_S = 3.0  # the engine itself reports missed deadlines; it has this long to do so
    STOPPING_RETRY_S = 1.0

    def __init__(self, config: RunConfig, folder: Path, make_engine: MakeSupervisedEngine = TorchrunEngine) -> None:
        self.state = "starting"
        self.reason = "the ranks are loading"
        self.restarts = 0
        self.gave_up = asyncio.Event()
        self._config = config
        self._folder = folder
        self._make_engine = make_engine
        self._open = OpenRequests(config.serve, config.plugin)
        own_time = OwnTime()
        hangs = HangDetector(
            first_step_s(config), config.launch.collective_timeout_s, own_time.now, remembered_share(config)
        )
        self._watch = Watch(hangs, own_time, TroubleLog())
        self._deaths = Deaths(config.serve)
        self._engine: SupervisedEngine | None = None
        self._session: RankSession | None = None
        self._load_s = 0.0
        self._next_try_at = 0.0
        self._died = 0
        self._troubles_in_row = 0
        self._start_error: EngineGone | None = None
        self._first_start = asyncio.Event()  # the first ranks are ready, or will never be
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo | None:
        """The latest state of the ranks; None while there are none."""
        return None if self._session is None else self._session.info

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

    async def stop(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let what runs end, answer the rest with a Failure of kind not_serving, and end all.

        A second call does nothing more.

        Args:
            drain_s: The longest time for what runs, seconds.
        """
        self._set_state("stopping", "the server is stopping")
        deadline = time.monotonic() + drain_s
        while self._open.outstanding and not self._at_once.is_set():
            self._answer_all("queued")
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(self.WATCH_S)
        self._answer_all("queued", "running")
        self._stopping.set()
        if self._task is not None:
            await self._task

    def abort(self) -> None:
        """Make `stop` wait for nothing: what runs is answered now, and the ranks are killed."""
        self._at_once.set()
        self._stopping.set()
        if self._engine is not None:
            asyncio.get_running_loop().run_in_executor(None, self._engine.kill)

    def submit(self, request: GenerationRequest) -> GenerationJob:
        """Accept a request; while ranks restart, it waits for the new ones.

        Args:
            request: The request for the engine.

        Returns:
            The job of the request.

        Raises:
            QueueFull: The queue holds serve.max_queue requests.
            NotServing: The ranks have died too often, or the server is stopping.
            ValueError: There is already a request with this id.
        """
        if self.state == "stopping":
            raise NotServing(self.reason, self.STOPPING_RETRY_S)
        if self.state == "failed":
            raise NotServing(self.reason, max(0.0, self._next_try_at - time.monotonic()) + self._load_s)
        waiting = len(self._open.queue())
        if waiting >= self._config.serve.max_queue:
            raise QueueFull(f"{waiting} requests are queued, which is serve.max_queue", self._retry_after_s())
        job = self._open.add(request)
        self._send_waiting()
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
        job.cancelling = True
        self._cancel_on_ranks(job)
        if job.state == "queued":
            self._open.fail(job, "cancelled", "the request was cancelled")
        return True

    @property
    def _is_ending(self) -> bool:
        """Whether no other ranks are to be started."""
        is_over = self._start_error is not None or self.gave_up.is_set()
        return is_over or self._stopping.is_set() or self.state == "stopping"

    async def _run(self) -> None:
        """Run one set of ranks after another until the server stops; no exception ends this."""
        while not self._is_ending:
            try:
                await self._run_next()
            except Exception as error:
                self._watch.troubles.add("supervising the ranks", error)
                await asyncio.sleep(RankSession.TROUBLE_S)
        self._first_start.set()

    async def _run_next(self) -> None:
        """Run one set of ranks, and wait as long as its end says."""
        kills = oom_kills()
        try:
            await self._run_ranks()
        except EngineGone as error:
            self._troubles_in_row = 0
            await self._wait(self._on_engine_gone(name_memory(error, kills)))
        except Exception as error:
            self._troubles_in_row += 1
            await self._wait(self._on_trouble(error))

    async def _wait(self, duration_s: float) -> None:
        """Wait before the next ranks; deadlines go on meanwhile."""
        self._next_try_at = time.monotonic() + duration_s
        while time.monotonic() < self._next_try_at and not self._is_ending:
            self._expire()
            await asyncio.sleep(self.WATCH_S)

    async def _run_ranks(self) -> None:
        """Run one set of ranks from its start to its end.

        Raises:
            EngineGone: The ranks died.
        """
        engine = self._engine = self._make_engine(self._config, self._folder)
        orderly = False
        try:
            began = time.monotonic()
            info = await self._load(engine)
            self._load_s = time.monotonic() - began
            self._session = RankSession(engine, info, self._watch, self._on_report, self._expire)
            self._on_ready()
            await self._session.run(self._send_waiting, self._stopping)
            orderly = not self._at_once.is_set()
        finally:
            self._session = None
            await end(engine.stop if orderly else engine.kill, self._watch.troubles)
            self._engine = None

    async def _load(self, engine: SupervisedEngine) -> EngineInfo:
        def stop_waiting(info: EngineInfo | None) -> None:
            if self._stopping.is_set():
                raise EngineGone("the server was stopped while its ranks were loading")

        loading = asyncio.ensure_future(asyncio.to_thread(engine.start, stop_waiting))
        while not loading.done():
            await asyncio.wait([loading], timeout=self.WATCH_S)
            self._expire()
        return loading.result()

    def _on_ready(self) -> None:
        """Record that new ranks are ready."""
        if self._first_start.is_set():
            self.restarts += 1
        self._first_start.set()
        self._set_state("ready", "")

    def _on_report(self, report: Report, frames: list[bytes]) -> None:
        """Apply a report of rank 0 about a request."""
        self._open.on_message(report, frames)
        if isinstance(report, GenerationResult):
            self._deaths.on_image()
        self._send_waiting()

    def _on_engine_gone(self, error: EngineGone) -> float:
        """Apply the death of the ranks.

        Args:
            error: The reason why they died.

        Returns:
            The pause before the next ranks, seconds.
        """
        log.error("%s", error)
        self._watch.hangs.on_engine_gone()
        if not self._first_start.is_set():
            self._fail_for_good(error)
            return 0.0
        self._deaths.add()
        if explained := self._open.on_engine_gone(error):
            self._deaths.explain(explained)
        self._archive_logs()
        pause_s, serve = self._deaths.pause_s, self._config.serve
        self._set_state("restarting", str(error))
        if pause_s:
            allowed = f"serve.restarts={serve.restarts} allows in {serve.restart_window_s:g} s"
            self._set_state(
                "failed",
                f"the ranks died more often than {allowed}; new ones start in {pause_s:g} s; the last: {error}",
            )
            if serve.exit_when_failed:
                self._give_up()
        return pause_s

    def _on_trouble(self, error: Exception) -> float:
        """Apply a trouble of the server itself: it could not start ranks.

        Args:
            error: The trouble.

        Returns:
            The pause before the next try, seconds.
        """
        self._watch.troubles.add("starting the ranks", error)
        self._watch.hangs.on_engine_gone()
        self._open.forget_sent()
        if not self._first_start.is_set():
            self._fail_for_good(EngineGone(failure_line(error)))
            return 0.0
        self._set_state("restarting", f"the ranks cannot be started ({failure_line(error)}); they are tried again")
        return pause_after(self._troubles_in_row)

    def _fail_for_good(self, error: EngineGone) -> None:
        """End a first start that failed: its reason is wrong input, and another try would find it again."""
        self._start_error = error
        self._set_state("failed", str(error))
        self._answer_all("queued", "running")

    def _give_up(self) -> None:
        self.gave_up.set()
        self._answer_all("queued", "running")

    def _archive_logs(self) -> None:
        """Move the dead ranks' logs to a folder, so that their errors are not read as those of the next ranks."""
        logs = self._folder / "logs"
        self._died += 1
        try:
            archive = logs / f"died{self._died}"
            archive.mkdir(parents=True, exist_ok=True)
            for file in (*logs.glob("rank*"), *logs.glob("launch.log")):
                file.rename(archive / file.name)
        except OSError as error:
            self._watch.troubles.add("keeping the logs of dead ranks", error)

    def _send_waiting(self) -> None:
        """Give the ranks what they may have now."""
        session = self._session
        if session is None or not session.connected:
            return
        for job in self._open.to_send():
            left_s = max(0.001, job.expires - time.monotonic())
            self._open.on_sent(job)
            session.send(msgspec.structs.replace(job.request, timeout_s=left_s))

    def _cancel_on_ranks(self, job: GenerationJob) -> None:
        if self._session is not None:
            self._session.cancel(job.request.request_id)

    def _answer_all(self, *states: str) -> None:
        """Answer the requests in some states: the server generates nothing any more."""
        for job in [job for job in self._open.outstanding.values() if job.state in states]:
            self._cancel_on_ranks(job)
            self._open.fail(job, "not_serving", self.reason, self.STOPPING_RETRY_S)

    def _expire(self) -> None:
        """Answer requests whose deadline has passed; the ranks have GRACE_S to answer for those that they have."""
        now, sent = time.monotonic(), self._open.sent
        for job in list(self._open.outstanding.values()):
            if now > job.expires + (self.GRACE_S if job.request.request_id in sent else 0.0):
                self._cancel_on_ranks(job)
                self._open.fail(job, "expired", "the deadline passed before the request was done")

    def _retry_after_s(self) -> float:
        """Estimate when the queue has room: after the loading of ranks and one request of mean duration, seconds."""
        loading_s = self._load_s if self.state in ("starting", "restarting") else 0.0
        return loading_s + self._open.mean_generation_s()

    def _set_state(self, state: str, reason: str) -> None:
        """Set the state; a server that is stopping has no other any more."""
        if self.state != "stopping":
            self.state, self.reason = state, reason


def name_memory(error: EngineGone, before: tuple[int, ...]) -> EngineGone:
    """Return why ranks died, with the kind oom if the kernel has killed processes for memory meanwhile.

    Args:
        error: The reason that the engine gives.
        before: The value of `oom_kills` at their start.
    """
    if error.kind != "failed" or not any(now > then for now, then in zip(oom_kills(), before, strict=False)):
        return error
    return EngineGone(f"{error}; the kernel killed a process because memory ran out", "oom")
