"""One rank in the calling process, without sockets or torchrun, for notebooks and debuggers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from harness.config.schema import RunConfig
from harness.engines.environment import arithmetic_environment, threads_per_rank
from harness.engines.protocol import Answer, OnProgress, RequestFailed
from harness.messages import DENOISING, EngineInfo, Failure, GenerationRequest, GenerationResult, Progress, decode
from harness.parallel.mesh import RankPosition
from harness.resolve.run import ResolvedRun

if TYPE_CHECKING:
    from harness.engines.loader import RankLoader
    from harness.serving.request_scheduler import RequestScheduler
    from harness.serving.transport import Connection

T = TypeVar("T")


class NoCancelFlags:
    """Cancel flags that are never set: nobody else can cancel, and a Ctrl-C ends the call itself."""

    def set(self, request_id: str) -> None:
        """Do nothing."""
        return None

    def is_set(self, request_id: str) -> bool:
        """Return False."""
        return False

    def clear(self, request_id: str) -> None:
        """Do nothing."""


class InprocessEngine:
    """The same request scheduler and worker at world size 1.

    `start` sets torch's threads for the process, `stop` restores them. MKL's strict mode can only be chosen before
    torch is first imported. If torch was imported earlier, the record's environment shows that the variable was not
    set.

    Args:
        config: the resolved configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._scheduler: RequestScheduler | None = None
        self._loader: RankLoader | None = None
        self._restore: Callable[[], None] = lambda: None
        self.reused: str | None = None
        self.environment: dict[str, str] = dict(os.environ)

    def start(self, on_wait: Callable[[EngineInfo | None], None]) -> EngineInfo:
        """Build the worker in this process."""
        import sys

        if "torch" not in sys.modules:
            os.environ.update(arithmetic_environment(self._config.launch, 1))
        self.environment = dict(os.environ)
        import torch

        from harness.device.device import pick_device
        from harness.engines.loader import RankLoader
        from harness.parallel.collectives import LocalCollectives
        from harness.serving.request_scheduler import RequestScheduler

        previous_threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
        root = logging.getLogger()
        level = root.level

        def restore() -> None:
            torch.set_num_threads(previous_threads)
            torch.backends.mkldnn.set_flags(onednn)
            torch.set_flush_denormal(False)
            root.setLevel(level)

        self._restore = restore
        run, device, collectives = ResolvedRun(self._config), pick_device(0), LocalCollectives()
        info = EngineInfo(
            "ready",
            1,
            [os.getpid()],
            device=str(device),
            threads=threads_per_rank(self._config.launch, 1),
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
        )
        self._loader = RankLoader(RankPosition(0, run.degrees), device, collectives, info)
        info = self._loader.load(run)
        self._scheduler = RequestScheduler(self._loader.worker, collectives, NoCancelFlags(), self._loader)
        return info

    def configure(self, config: RunConfig) -> EngineInfo:
        """Change the worker to another configuration."""
        if self._loader is None:
            raise RuntimeError("the engine is not running; call start() first")
        self._config = config
        return self._loader.load(ResolvedRun(config))

    def generate(self, request: GenerationRequest, on_progress: OnProgress) -> Answer:
        """Run one request in the calling thread.

        Args:
            request: the request.
            on_progress: a callback that receives the request's progress.

        Returns:
            The result and its frames.

        Raises:
            RequestFailed: the typed answer of the worker or of its check.
            RuntimeError: the engine is not running.
        """
        if self._scheduler is None:
            raise RuntimeError("the engine is not running; call start() first")
        try:
            self._scheduler.worker.pipeline.check(request)
        except ValueError as error:
            raise RequestFailed(Failure(request.request_id, "rejected", str(error))) from error

        def report_progress(stage: str, done: int, total: int) -> None:
            on_progress(Progress(request.request_id, stage, done, total))

        def report_preview(done: int, total: int, preview: bytes) -> None:
            on_progress(Progress(request.request_id, DENOISING, done, total, preview))

        frames = self._scheduler.run_request(request, report_progress, lambda: False, report_preview)
        message = decode(frames)
        if isinstance(message, GenerationResult):
            return message, frames
        if isinstance(message, Failure):
            raise RequestFailed(message)
        raise RuntimeError(f"the engine answered with {type(message).__name__}")

    def with_connection(self, clients: Callable[[Connection], T]) -> T:
        """Refuse: this engine has no sockets. Raises RuntimeError."""
        raise RuntimeError("launch.mode=inprocess has no sockets; use launch.mode=torchrun")

    def stop(self) -> None:
        """Drop the worker and restore torch's settings."""
        self._scheduler = self._loader = None
        self._restore()
        self._restore = lambda: None
