"""Ranks in processes of their own: starting, watching and ending torchrun so that no process is left."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import msgspec

from harness.config.schema import RunConfig
from harness.engines.environment import SOCKETS, loopback_environment, rank_environment
from harness.engines.fork_server import KILL_S, Agent, AgentOrder, ForkServer
from harness.engines.processes import ProcessHandle, children, is_stopped
from harness.engines.protocol import Answer, OnProgress, configure_and_wait, send_and_wait
from harness.messages import EngineInfo, GenerationRequest
from harness.parallel.mesh import degrees, world_size
from harness.serving.transport import Addresses, Connection, EngineGone

TAIL_LINES = 3
FAILED = re.compile(r"failed \(exitcode: (-?\d+)\)\s+local_rank: (\d+)")  # a line of torchrun's agent
VAGUE_CODES = (0, 1, -signal.SIGTERM)  # of ranks that have only lost another one
REASON_S = 0.5
STOPPED_LOOKS = 25  # about 5 s of Connection.POLL_MS; this process may have been stopped, too, so time says nothing
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
    """An engine of `parallel` ranks on this machine under torchrun, also at world size 1; none listens on a network.

    Args:
        config: the resolved configuration.
        folder: the run's folder, with the configuration in `config.yaml`; logs go to its `logs/`.
        fork_server: what starts the ranks, kept by the caller so that later ranks start without importing; None for
            one that ends with this engine.
    """

    def __init__(self, config: RunConfig, folder: Path, fork_server: ForkServer | None = None) -> None:
        self._config = config
        self._folder = folder
        self._world_size = world_size(degrees(config.parallel))
        self._fork_server = ForkServer() if fork_server is None else fork_server
        self._owns_fork_server = fork_server is None
        self._agent: Agent | None = None
        self._addresses: Addresses | None = None
        self._connection: Connection | None = None
        self._ranks: list[ProcessHandle] = []  # once they are ready
        self._codes: dict[int, int | None] = {}  # of ranks that have ended
        self._ended_at = float("inf")
        self._stopped: Counter[int] = Counter()  # how often a process was seen stopped by a signal while ranks load
        self.reused: str | None = None
        self.environment = os.environ | rank_environment(config, self._world_size) | loopback_environment()

    def start(self, on_wait: Callable[[EngineInfo | None], None]) -> EngineInfo:
        """Start torchrun and wait until every rank is ready."""
        self._addresses = Addresses.private()
        sockets, log = self._addresses.folder, self._logs / "launch.log"
        log.write_bytes(b"")
        options = ["--nproc-per-node", str(self._world_size), "--log-dir", str(sockets / "torchrun")]
        folder, own = str(self._folder.resolve()), {SOCKETS: str(sockets)}
        order = AgentOrder(folder, str(sockets), options, own, str(log.resolve()), working_folder())
        self._agent = self._fork_server.start_agent(order, self.environment)
        self._connection = Connection(self._addresses, self.check_alive)
        try:
            info = self._connection.wait_ready(self._config.launch.start_timeout_s, on_wait)
        except EngineGone:
            if self._agent.pid is None:  # it would keep the next ranks waiting, too
                self._agent.end_server()
            raise
        self._ranks = [handle for pid in info.pids if (handle := ProcessHandle.open(pid)) is not None]
        if len(self._ranks) < len(info.pids):
            raise post_mortem(self._logs)
        return info

    def configure(self, config: RunConfig) -> EngineInfo:
        """Change the running ranks to another configuration."""
        if self._connection is None:
            raise RuntimeError("the engine is not running; call start() first")
        info, self._config = configure_and_wait(self._connection, config), config
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
        self._end(orderly=bool(self._ranks))  # ranks that have not loaded yet do not listen for a Shutdown

    def kill(self) -> None:
        """End at once ranks that may no longer answer, such as a stopped process, which ignores SIGTERM."""
        self._end(orderly=None)

    def _end(self, orderly: bool | None) -> None:
        """End every process.

        Args:
            orderly: whether the ranks are asked to end before torchrun is; None kills all of them at once.
        """
        agent, self._agent = self._agent, None
        connection, self._connection = self._connection, None
        try:
            if connection is not None:
                if orderly:
                    connection.shutdown()
                connection.close()
        finally:
            if agent is not None:
                self._end_ranks(agent, orderly)
                agent.close()
            if self._owns_fork_server:
                self._fork_server.close()
            if self._addresses is not None:
                self._addresses.remove()

    def _end_ranks(self, agent: Agent, orderly: bool | None) -> None:
        """End torchrun, and then every rank that is left."""
        ranks, self._ranks = self._ranks, []
        if not ranks and agent.pid is not None:  # they are loading
            ranks = [handle for pid in children(agent.pid) if (handle := ProcessHandle.open(pid)) is not None]
        if orderly is not None:
            _terminate(agent, self._config.launch.stop_timeout_s, orderly)
        for rank in ranks:  # torchrun has already ended them, unless it was killed itself
            rank.send(signal.SIGKILL)
        agent.send(signal.SIGKILL)
        agent.has_ended(KILL_S)
        for rank in ranks:
            rank.has_ended(KILL_S)
            rank.close()

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
        """Raise EngineGone if a rank has ended, or will soon because it has left its error.

        A rank that is gone is known at once; torchrun may need REASON_S to write the reason.

        Raises:
            post_mortem: an EngineGone with the reason.
        """
        if self._agent is None:
            return
        if not self._ranks:
            self._check_stopped(self._agent)
        for number, rank in enumerate(self._ranks):
            if self._codes.get(number) is None and rank.has_ended():
                self._codes[number] = rank.exit_code
                self._ended_at = min(self._ended_at, time.monotonic())
        seen = [*self._codes.values(), *(exit_codes(self._logs).values() if self._codes else ())]
        known = any(code not in (None, *VAGUE_CODES) for code in seen)
        waited = time.monotonic() - self._ended_at > REASON_S
        if known or waited or self._agent.has_ended() or rank_error(self._logs) is not None:
            raise post_mortem(self._logs, self._codes)

    def _check_stopped(self, agent: Agent) -> None:
        """Raise EngineGone if somebody has stopped a process with SIGSTOP while the ranks load.

        Raises:
            EngineGone: A process is stopped, and was at the last looks.
        """
        pids = [agent.server_pid] if agent.pid is None else [agent.server_pid, agent.pid, *children(agent.pid)]
        self._stopped = Counter({pid: self._stopped[pid] + 1 for pid in pids if is_stopped(pid)})
        if max(self._stopped.values(), default=0) > STOPPED_LOOKS:
            raise EngineGone(f"process {max(self._stopped)} was stopped by a signal while the ranks were loading")

    @property
    def _logs(self) -> Path:
        return self._folder / "logs"


def working_folder() -> str:
    """Return the working folder, or an empty text if it was deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def _terminate(agent: Agent, timeout_s: float, orderly: bool) -> None:
    """End torchrun: wait if it was asked to end in order, then send SIGTERM, upon which it ends its ranks."""
    for send in ((lambda: None), agent.terminate) if orderly else (agent.terminate,):
        send()
        try:
            if agent.has_ended(timeout_s):
                return
        except KeyboardInterrupt:  # a second Ctrl-C: wait no longer
            timeout_s = 0.5


def post_mortem(logs: Path, codes: Mapping[int, int | None] = MappingProxyType({})) -> EngineGone:
    """Return why the ranks died, in one line.

    The sources in this order: a rank's own error, the signal or exit code that the engine or torchrun saw, the last
    lines of the log.

    Args:
        logs: the folder of the logs.
        codes: the exit codes of the ranks that have ended, as far as the engine saw them.
    """
    error = rank_error(logs)
    if error is not None:
        return EngineGone(f"rank {error.rank}: {error.message}", error.kind)
    known = {number: code for number, code in codes.items() if code is not None} | exit_codes(logs)
    if not known and codes:
        return EngineGone(f"rank {min(codes)} died; {_tail(logs / f'rank{min(codes)}.log')}")
    if not known:
        return EngineGone(f"the ranks ended unexpectedly; {_tail(logs / 'launch.log')}")
    rank, code = min(known.items(), key=lambda death: death[1] in VAGUE_CODES)
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    from_outside = code == -signal.SIGKILL
    return EngineGone(f"rank {rank} died with {name}; {_tail(logs / f'rank{rank}.log')}", from_outside=from_outside)


def exit_codes(logs: Path) -> dict[int, int]:
    """Return the exit codes by rank that torchrun has logged; it logs the first one only, as soon as it sees it."""
    log = logs / "launch.log"
    text = log.read_text(errors="replace") if log.exists() else ""
    return {int(rank): int(code) for code, rank in FAILED.findall(text)}


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
