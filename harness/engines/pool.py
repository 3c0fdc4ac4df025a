"""Engines that stay warm between the jobs of a sweep: up to launch.reuse of them, changed to what each job runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeAlias, TypeVar

import msgspec

from harness.config.schema import LaunchMode, RunConfig
from harness.engines.fork_server import ForkServer
from harness.engines.inprocess import InprocessEngine
from harness.engines.protocol import Answer, Engine, OnProgress, RequestFailed, WarmEngine
from harness.engines.torchrun import TorchrunEngine
from harness.messages import EngineInfo, GenerationRequest
from harness.resolve.engine_key import pipeline_key, process_key, weights_key
from harness.serving.transport import Connection

AUTO_ENGINES = 4  # the measured ranks, and those of a reference, of its floor and of a method in float32
SMALL_BYTES = 2**31  # the weights of all warm engines up to which launch.reuse=null starts another one beside them
HARMLESS_FAILURES = ("rejected",)  # kinds of failure that leave the ranks as they were

T = TypeVar("T")
MakeEngine: TypeAlias = Callable[[RunConfig, Path], Engine]
MakeWarmEngine: TypeAlias = Callable[[RunConfig, Path], WarmEngine]


def new_engine(config: RunConfig, folder: Path, fork_server: ForkServer | None = None) -> WarmEngine:
    """Return an engine with fresh ranks, as launch.mode says; their logs go to `folder`.

    Args:
        config: the resolved configuration.
        folder: the run's folder.
        fork_server: what starts the ranks; None for one of the engine's own.
    """
    inprocess = config.launch.mode is LaunchMode.inprocess
    return InprocessEngine(config) if inprocess else TorchrunEngine(config, folder, fork_server)


class EnginePool:
    """A pool of at most launch.reuse warm engines, which change their configuration as the jobs do.

    Use it as a context manager: on exit, every process that it started has ended. An engine in the calling process is
    always the only one. Fresh ranks are forked from one server, so that only the first ones wait for imports. A job
    gets, in this order: an engine that runs its configuration already; one that has its weights; ranks that can load
    them; fresh ranks, for which the least recently used engine ends if there are too many.

    Args:
        make: a function that makes fresh engines; None for `new_engine`.
    """

    def __init__(self, make: MakeWarmEngine | None = None) -> None:
        self._fork_server = ForkServer()
        self.saved_ms = 0.0
        self.starts = 0
        self.reuses = 0
        self._make = make or partial(new_engine, fork_server=self._fork_server)
        self._warm: list[PooledEngine] = []  # in order of use, the most recent last

    def engine(self, config: RunConfig, folder: Path) -> Engine:
        """Return an engine for a configuration, which nobody else gets until it is stopped.

        Args:
            config: the resolved configuration.
            folder: the run's folder, to which a fresh engine logs.
        """
        reuse = config.launch.reuse
        if reuse is not None and reuse < 1:
            self._make_room(0)
            return self._make(config, folder)
        inprocess = config.launch.mode is LaunchMode.inprocess
        limit = 1 if inprocess else self._limit() if reuse is None else reuse
        found = self._reusable(config, start_first=reuse is not None and len(self._warm) < limit)
        if found is None:
            self._make_room(0 if inprocess else limit - 1)
            found = PooledEngine(self, self._make(config, folder), folder)
        else:
            self._warm.remove(found)
        self._warm.append(found)
        found.lend(config)
        return found

    def _limit(self) -> int:
        """Return the number of engines with launch.reuse=null: one, and those of references beside small weights."""
        return AUTO_ENGINES if sum(engine.weight_bytes for engine in self._warm) <= SMALL_BYTES else 1

    def _reusable(self, config: RunConfig, start_first: bool) -> PooledEngine | None:
        """Return the idle engine that has the least to change for a configuration, or None.

        Args:
            config: the resolved configuration.
            start_first: whether fresh ranks come before ranks that have other weights.
        """
        idle = [engine for engine in self._warm if not engine.is_lent]
        for key in (pipeline_key, weights_key):
            found = [engine for engine in idle if process_key(engine.config) == process_key(config)]
            if same := [engine for engine in found if key(engine.config) == key(config)]:
                return same[-1]
        return None if start_first or not found else found[0]

    def forget(self, engine: PooledEngine) -> None:
        """End an engine that must not be used again."""
        self._warm = [warm for warm in self._warm if warm is not engine]
        engine.end()

    def close(self) -> None:
        """End every engine. A second call does nothing."""
        for engine in list(self._warm):
            self.forget(engine)
        self._fork_server.close()

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_room(self, left: int) -> None:
        idle = [engine for engine in self._warm if not engine.is_lent]
        for engine in idle[: max(0, len(self._warm) - left)]:
            self.forget(engine)


class PooledEngine:
    """An engine whose `stop` leaves it warm, unless one of its requests failed.

    Args:
        pool: the pool that owns this engine.
        engine: the engine that does the work.
        folder: the folder of the run that starts it.

    Attributes:
        config: the configuration of the run that has it, or had it last.
        is_lent: whether a run has it.
    """

    def __init__(self, pool: EnginePool, engine: WarmEngine, folder: Path) -> None:
        self.environment = engine.environment
        self.reused: str | None = None
        self.is_lent = False
        self._pool = pool
        self._engine = engine
        self._folder = folder
        self._info: EngineInfo | None = None
        self._runs = ""  # the key of the pipeline that the ranks have
        self._start_ms = 0.0
        self._failed = False

    def lend(self, config: RunConfig) -> None:
        """Give the engine to a run.

        Args:
            config: the run's resolved configuration, which `start` changes the ranks to.
        """
        self.config = config
        self.is_lent = True

    @property
    def weight_bytes(self) -> int:
        """The bytes of weights on all ranks, as far as they are known."""
        return 0 if self._info is None else self._info.world_size * sum(part.bytes for part in self._info.loaded)

    def start(self, on_wait: Callable[[EngineInfo | None], None]) -> EngineInfo:
        """Start the ranks, or reuse the warm ones; those that run the configuration already have loaded in 0 ms."""
        start, wanted, self._failed = time.perf_counter(), pipeline_key(self.config), True  # until the ranks are ready
        if self._info is None:
            self._info = self._engine.start(on_wait)
            self._start_ms = (time.perf_counter() - start) * 1e3
            self._pool.starts += 1
            self.environment = self._engine.environment
        else:
            if wanted != self._runs:
                self._info = self._engine.configure(self.config)
            else:
                self._info = msgspec.structs.replace(self._info, load_ms=0.0)
            self.reused = str(self._folder)
            self._pool.reuses += 1
            self._pool.saved_ms += max(0.0, self._start_ms - (time.perf_counter() - start) * 1e3)
        self._runs, self._failed = wanted, False
        return self._info

    def generate(self, request: GenerationRequest, on_progress: OnProgress) -> Answer:
        """Run one request; a failure that may have harmed the ranks makes `stop` end them."""
        try:
            return self._engine.generate(request, on_progress)
        except BaseException as error:
            self._failed = not (isinstance(error, RequestFailed) and error.kind in HARMLESS_FAILURES)
            raise

    def with_connection(self, clients: Callable[[Connection], T]) -> T:
        """Call a function with a connection; an exception makes `stop` end the ranks."""
        try:
            return self._engine.with_connection(clients)
        except BaseException:
            self._failed = True
            raise

    def stop(self) -> None:
        """Keep the ranks warm for the next run, or end them if a request failed."""
        self.is_lent = False
        if self._failed or self._info is None:
            self._pool.forget(self)

    def end(self) -> None:
        """End the ranks."""
        self._engine.stop()
