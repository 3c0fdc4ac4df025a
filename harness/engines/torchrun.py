"""Ranks as child processes: starting, watching and ending torchrun so that no process is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from harness.config.schema import RunConfig
from harness.engines.environment import OWNER, SOCKETS, arithmetic_environment, import_environment
from harness.engines.protocol import Answer, OnProgress, send_and_wait
from harness.messages import EngineInfo, GenerationRequest
from harness.parallel.mesh import degrees, world_size
from harness.serving.transport import Addresses, Connection, EngineGone

TAIL_LINES = 3
T = TypeVar("T")


class RankError(msgspec.Struct, frozen=True):
    """What a rank writes to `logs/rankN.error.json` before it dies of an exception.

    Args:
        rank: the rank's number in the world.
        message: the reason in one line.
        kind: the kind of failure.
        peer_lost: whether the rank failed only because another rank died first.
    """

    rank: int
    message: str
    kind: str
    peer_lost: bool


class TorchrunEngine:
    """An engine of `parallel` ranks on this machine under `torchrun --standalone` (also at world size 1).

    Args:
        config: the resolved configuration.
        folder: the run's folder, with the configuration in `config.yaml`; logs go to its `logs/`.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._ranks = world_size(degrees(config.parallel))
        self._process: subprocess.Popen[bytes] | None = None
        self._addresses: Addresses | None = None
        self._connection: Connection | None = None
        self._pids: list[int] = []
        self.reused: str | None = None
        self.environment = os.environ | arithmetic_environment(config.launch, self._ranks)

    def start(self, on_wait: Callable[[EngineInfo | None], None]) -> EngineInfo:
        """Start torchrun and wait until every rank is ready."""
        self._addresses = Addresses.private()
        own = {SOCKETS: str(self._addresses.folder), OWNER: str(os.getpid())}
        environment = self.environment | own | import_environment()
        command = [
            sys.executable,
            "-u",
            "-m",
            "harness.engines.fork_agent",
            "--standalone",
            "--nproc-per-node",
            str(self._ranks),
        ]
        command += ["--log-dir", str(self._addresses.folder / "torchrun")]
        command += ["-m", "harness.engines.rank", str(self._folder.resolve())]
        with self._launch_log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._connection = Connection(self._addresses, self.check_alive)
        info = self._connection.wait_ready(self._config.launch.start_timeout_s, on_wait)
        self._pids = info.pids
        return info

    def generate(self, request: GenerationRequest, on_progress: OnProgress) -> Answer:
        """Send one request and wait for its answer."""
        if self._connection is None:
            raise RuntimeError("the engine is not running; call start() first")
        return send_and_wait(self._connection, request, on_progress)

    def with_connection(self, clients: Callable[[Connection], T]) -> T:
        """Call a function with a new connection, closed afterwards."""
        with closing(Connection(self.addresses, self.check_alive)) as connection:
            return clients(connection)

    def stop(self) -> None:
        """End the ranks in order if they are ready, and kill those that do not end in time."""
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        orderly = bool(self._pids)  # ranks that have not loaded yet do not listen for a Shutdown
        try:
            if connection is not None:
                if orderly:
                    connection.shutdown()
                connection.close()
        finally:
            if process is not None:
                _terminate(process, self._config.launch.stop_timeout_s, orderly)
            for pid in self._pids:  # torchrun has already ended them, unless it was killed itself
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._pids = []
            if self._addresses is not None:
                self._addresses.remove()

    def kill(self) -> None:
        """End at once ranks that may no longer answer, such as a stopped process, which ignores SIGTERM.

        No process of them is left. Ranks that are still loading are known to torchrun alone, so torchrun ends them.
        """
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process is not None and self._pids:
            self._process.kill()
        self.stop()

    @property
    def addresses(self) -> Addresses:
        """The addresses of the ranks.

        Raises:
            RuntimeError: the engine was not started.
        """
        if self._addresses is None:
            raise RuntimeError("the engine is not running; call start() first")
        return self._addresses

    def check_alive(self) -> None:
        """Raise EngineGone if torchrun has ended the ranks, or will soon because one of them has left its error."""
        if self._process is not None and (self._process.poll() is not None or rank_error(self._logs) is not None):
            raise post_mortem(self._logs)

    @property
    def _logs(self) -> Path:
        return self._folder / "logs"

    @property
    def _launch_log(self) -> Path:
        return self._logs / "launch.log"


def _terminate(process: subprocess.Popen[bytes], timeout_s: float, orderly: bool) -> None:
    """End torchrun: wait if it was asked to end in order, then send SIGTERM (it ends its ranks), then SIGKILL."""
    for send in ((lambda: None), process.terminate, process.kill) if orderly else (process.terminate, process.kill):
        send()
        try:
            process.wait(timeout_s)
            return
        except subprocess.TimeoutExpired:
            continue
        except KeyboardInterrupt:  # a second Ctrl-C: wait no longer
            timeout_s = 0.5
    process.wait()


def post_mortem(logs: Path) -> EngineGone:
    """Return why the ranks died, in one line.

    The sources in this order: a rank's own error, the signal or exit code that torchrun saw, the last lines of the log.
    """
    error = rank_error(logs)
    if error is not None:
        return EngineGone(f"rank {error.rank}: {error.message}", error.kind)
    log = logs / "launch.log"
    text = log.read_text(errors="replace") if log.exists() else ""
    deaths = re.findall(r"rank\s*:\s*(\d+) \(local_rank.*?exitcode\s*:\s*(-?\d+)", text, flags=re.DOTALL)
    if not deaths:
        return EngineGone(f"the ranks ended unexpectedly; {_tail(log)}")
    rank, code = min(deaths, key=lambda death: int(death[1]) in (-signal.SIGTERM, 1))
    name = signal.Signals(-int(code)).name if int(code) < 0 else f"exit code {code}"
    return EngineGone(f"rank {rank} died with {name}; {_tail(logs / f'rank{rank}.log')}")


def rank_error(logs: Path) -> RankError | None:
    """Return the error that a rank left behind, or None. Errors of ranks that only lost their peer are ignored."""
    errors = [_read_error(path) for path in sorted(logs.glob("rank*.error.json"))]
    return next((error for error in errors if error is not None and not error.peer_lost), None)


def _read_error(path: Path) -> RankError | None:
    with suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(path.read_bytes(), type=RankError)
    return None


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    last = " | ".join(line.strip() for line in lines[-TAIL_LINES:])
    return f"last lines of {log}: {last}" if last else f"{log} is empty"
