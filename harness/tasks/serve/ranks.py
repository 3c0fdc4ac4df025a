"""One set of ranks as the supervisor sees it: its messages, its state, and how its death or its hang is found."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from harness.config.schema import RunConfig
from harness.messages import EngineInfo, Failure, GenerationRequest, GenerationResult, Message, Progress
from harness.serving.transport import Addresses, EngineGone
from harness.tasks.serve.engine_client import EngineClient
from harness.tasks.serve.hangs import HangDetector, OwnTime, StoppedRanks
from harness.tasks.serve.restarts import TroubleLog

log = logging.getLogger(__name__)
Report: TypeAlias = Progress | GenerationResult | Failure


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


@dataclass
class Watch:
    """What outlives a set of ranks: times of steps, the server's clock, and its troubles."""

    hangs: HangDetector
    own_time: OwnTime
    troubles: TroubleLog


class RankSession:
    """The exchange with one set of started ranks.

    Args:
        engine: The started ranks.
        info: The state that they reported when they were ready.
        watch: The detector of hangs, the clock and the log of troubles.
        on_report: The function that applies a report of rank 0 about a request.
        on_tick: The function that is called many times a second.
    """

    PING_S = 1.0
    PINGS = 10  # after this many unanswered pings in a row, rank 0 counts as stopped
    WATCH_S = 0.05
    GRACE_S = 3.0  # the time to read what came while this process was stopped
    TROUBLE_S = 1.0  # the pause before something is tried again that the system did not allow

    def __init__(
        self,
        engine: SupervisedEngine,
        info: EngineInfo,
        watch: Watch,
        on_report: Callable[[Report, list[bytes]], None],
        on_tick: Callable[[], None],
    ) -> None:
        self.info = info
        self._engine = engine
        self._watch = watch
        self._on_report = on_report
        self._on_tick = on_tick
        self._client: EngineClient | None = None
        self._missed_pings = 0
        self._stopped = StoppedRanks(watch.own_time.now)
        self._quiet_until = 0.0
        self._lost_s = 0.0

    @property
    def connected(self) -> bool:
        """Whether requests can be sent."""
        return self._client is not None

    def send(self, request: GenerationRequest) -> None:
        """Send a request; the session is connected."""
        assert self._client is not None
        self._client.send(request)
        self._watch.hangs.on_sent(request)

    def cancel(self, request_id: str) -> None:
        """Tell the ranks to cancel a request; nothing happens without a connection."""
        if self._client is not None:
            self._client.cancel(request_id)

    async def run(self, on_connected: Callable[[], None], stopping: asyncio.Event) -> None:
        """Exchange messages with the ranks until the server stops.

        Args:
            on_connected: The function that is called once requests can be sent.
            stopping: The event that ends the exchange.

        Raises:
            EngineGone: The ranks died, or do not answer any more.
        """
        client = self._client = await self._connect(stopping)
        self._watch.own_time.now()
        self._lost_s = self._watch.own_time.lost_s
        on_connected()
        duties = [
            self._repeat("receiving", lambda: self._receive(client)),
            self._repeat("pinging the ranks", lambda: self._ping(client)),
            self._repeat("watching the ranks", self._look),
            stopping.wait(),
        ]
        tasks = [asyncio.ensure_future(duty) for duty in duties]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._client = None
        try:
            for task in done:
                task.result()
        except EngineGone:
            await asyncio.gather(end(self._engine.kill, self._watch.troubles), self._drain(client))
            raise
        await client.close(linger_ms=500)  # cancellations of what was still running

    async def _connect(self, stopping: asyncio.Event) -> EngineClient:
        """Connect to ready ranks; they are not to blame if the system has no socket left."""
        while not stopping.is_set():
            self._engine.check_alive()
            self._on_tick()
            try:
                return EngineClient(self._engine.addresses)
            except Exception as error:
                self._watch.troubles.add("connecting to the ranks", error)
                await asyncio.sleep(self.TROUBLE_S)
        raise EngineGone("the server was stopped before it reached its ranks")

    async def _drain(self, client: EngineClient) -> None:
        """Handle the answers that the ranks sent before their end."""
        try:
            while await client.has_unread():
                await self._receive(client)
        except Exception as error:
            self._watch.troubles.add("reading the last answers of the ranks", error)
        finally:
            await client.close()

    async def _repeat(self, what: str, duty: Callable[[], Awaitable[None]]) -> None:
        """Do something again and again; the server's own troubles do not end it.

        Args:
            what: What is done, for the log.
            duty: The function that does it once.

        Raises:
            EngineGone: The ranks died.
        """
        while True:
            try:
                await duty()
            except EngineGone:
                raise
            except Exception as error:
                self._watch.troubles.add(what, error)
                await asyncio.sleep(self.TROUBLE_S)

    async def _receive(self, client: EngineClient) -> None:
        self._apply(*await client.receive())

    def _apply(self, message: Message, frames: list[bytes]) -> None:
        if not isinstance(message, Progress | GenerationResult | Failure):
            log.warning("the engine sent %s on the request socket", type(message).__name__)
            return
        self._watch.hangs.on_message(message)
        self._on_report(message, frames)

    async def _ping(self, client: EngineClient) -> None:
        info = await client.ping(self.PING_S)
        self._missed_pings = self._missed_pings + 1 if info is None else 0
        if info is not None:
            self.info = info
            await asyncio.sleep(self.PING_S)
        elif self._missed_pings >= self.PINGS:
            raise EngineGone(f"rank 0 answered no ping for {self.PINGS * self.PING_S:g} s: it has stopped")

    async def _look(self) -> None:
        """Look for a death, a hang and passed deadlines. After this process was stopped, it first reads what came."""
        clock = self._watch.own_time
        now = clock.now()
        if clock.lost_s > self._lost_s:
            self._lost_s, self._missed_pings, self._quiet_until = clock.lost_s, 0, now + self.GRACE_S
        self._engine.check_alive()
        if now >= self._quiet_until:
            self._watch.hangs.check()
            self._stopped.check(self.info.pids)
            self._on_tick()
        await asyncio.sleep(self.WATCH_S)


async def end(engine_end: Callable[[], None], troubles: TroubleLog) -> None:
    """End ranks in a thread; no process of them may be left, whatever troubles the server has.

    Args:
        engine_end: The engine's `stop` or `kill`.
        troubles: The log of troubles.
    """
    for _ in range(10):
        try:
            return await asyncio.to_thread(engine_end)
        except Exception as error:
            troubles.add("ending the ranks", error)
            await asyncio.sleep(RankSession.TROUBLE_S)
