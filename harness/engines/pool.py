"""Engines that stay warm between the jobs of a sweep: up to launch.reuse of them, by what they were built from."""

from __future__ import annotations

import json
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
from harness.engines.protocol import Answer, Engine, OnProgress, RequestFailed
from harness.engines.torchrun import TorchrunEngine
from harness.messages import EngineInfo, GenerationRequest
from harness.resolve.compose import to_dict
from harness.serving.transport import Connection

BUILT_FROM = (
    *("engine", "model", "scheduler", "parallel", "attention", "cache", "stages", "launch", "serve"),
    *("plugin", "plugin_sources"),
)
HARMLESS_FAILURES = ("rejected",)  # kinds of failure that leave the ranks as they were

T = TypeVar("T")
MakeEngine: TypeAlias = Callable[[RunConfig, Path], Engine]


def new_engine(config: RunConfig, folder: Path, fork_server: ForkServer | None = None) -> Engine:
    """Return an engine with fresh ranks, as launch.mode says; their logs go to `folder`.

    Args:
        config: the resolved configuration.
        folder: the run's folder.
        fork_server: what starts the ranks; None for one of the engine's own.
    """
    inprocess = config.launch.mode is LaunchMode.inprocess
    return InprocessEngine(config) if inprocess else TorchrunEngine(config, folder, fork_server)


def engine_key(config: RunConfig) -> str:
    """Return what an engine is built from, as text: configurations with equal keys can share the same ranks."""
    declared = to_dict(config)
    task = [config.task.name.name, config.task.fidelity]  # ranks compare their operators if fidelity is measured
    return json.dumps([*task, *(declared[part] for part in BUILT_FROM)], sort_keys=True)


class EnginePool:
    """A pool of at most launch.reuse warm engines; the least recently used one ends first.

    Use it as a context manager: on exit, every process that it started has ended. An engine in the calling process is
    always the only one. Fresh ranks are forked from one server, so that only the first ones wait for imports.

    Args:
        make: a function that makes fresh engines; None for `new_engine`.
    """

    def __init__(self, make: MakeEngine | None = None) -> None:
        self._fork_server = ForkServer()
        self.saved_ms = 0.0
        self.starts = 0
        self.reuses = 0
        self._make = make or partial(new_engine, fork_server=self._fork_server)
        self._warm: dict[str, PooledEngine] = {}  # in order of use, the most recent last

    def engine(self, config: RunConfig, folder: Path) -> Engine:
        """Return an engine for a configuration: a warm one if its ranks are running, else a fresh one.

        Args:
            config: the resolved configuration.
            folder: the run's folder, to which a fresh engine logs.
        """
        if config.launch.reuse < 1:
            self._make_room(0)
            return self._make(config, folder)
        key = engine_key(config)
        found = self._warm.pop(key, None)
        if found is None:
            inprocess = config.launch.mode is LaunchMode.inprocess
            self._make_room(0 if inprocess else config.launch.reuse - 1)
            found = PooledEngine(self, self._make(config, folder), folder)
        self._warm[key] = found
        return found

    def forget(self, engine: PooledEngine) -> None:
        """End an engine that must not be used again."""
        self._warm = {key: warm for key, warm in self._warm.items() if warm is not engine}
        engine.end()

    def close(self) -> None:
        """End every engine. A second call does nothing."""
        self._make_room(0)
        self._fork_server.close()

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_room(self, left: int) -> None:
        for engine in list(self._warm.values())[: max(0, len(self._warm) - left)]:
            self.forget(engine)


class PooledEngine:
    """An engine whose `stop` leaves it warm, unless one of its requests failed.

    Args:
        pool: the pool that owns this engine.
        engine: the engine that does the work.
        folder: the folder of the run that starts it.
    """

    def __init__(self, pool: EnginePool, engine: Engine, folder: Path) -> None:
        self.environment = engine.environment
        self.reused: str | None = None
        self._pool = pool
        self._engine = engine
        self._folder = folder
        self._info: EngineInfo | None = None
        self._start_ms = 0.0
        self._failed = False

    def start(self, on_wait: Callable[[EngineInfo | None], None]) -> EngineInfo:
        """Start the ranks, or reuse the warm ones; a reused engine has loaded in 0 ms."""
        if self._info is not None:
            self.reused = str(self._folder)
            self._pool.reuses += 1
            self._pool.saved_ms += self._start_ms
            return msgspec.structs.replace(self._info, load_ms=0.0)
        start = time.perf_counter()
        self._failed = True  # until the ranks are ready
        self._info = self._engine.start(on_wait)
        self._failed = False
        self._start_ms = (time.perf_counter() - start) * 1e3
        self._pool.starts += 1
        self.environment = self._engine.environment
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
        """Keep the ranks warm, or end them if a request failed."""
        if self._failed:
            self._pool.forget(self)

    def end(self) -> None:
        """End the ranks."""
        self._engine.stop()
