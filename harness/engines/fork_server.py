"""The owner's side of the fork server, a process that starts sets of ranks without importing PyTorch again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import msgspec

from harness.engines.environment import OWNER, SOCKETS, import_environment
from harness.engines.processes import ProcessHandle
from harness.serving.transport import EngineGone

MAX_ORDER_BYTES = 1 << 16
OTHERS_VARIABLES = ("WANDB_",)  # wandb sets some as it starts, and ranks read none
KILL_S = 10.0  # the longest wait for a process that has been sent SIGKILL


class AgentOrder(msgspec.Struct, frozen=True):
    """What the fork server needs to start an agent.

    Attributes:
        folder: The run's folder, with config.yaml.
        sockets: The private folder of this set of ranks; the server removes it if the owner is killed.
        options: Options for torchrun.
        variables: Environment variables of these ranks alone.
        log: The file for the agent's output.
        working_folder: The working folder; empty if the owner's does not exist any more.
    """

    folder: str
    sockets: str
    options: list[str]
    variables: dict[str, str]
    log: str
    working_folder: str


class Agent:
    """torchrun's agent of one set of ranks, from the order on; the fork server may still be importing.

    Args:
        server: The process of the fork server.
        reply: The socket on which the fork server answers.
    """

    def __init__(self, server: subprocess.Popen[bytes], reply: socket.socket) -> None:
        self._server = server
        self._reply = reply
        self._process: ProcessHandle | None = None
        self._refused = False
        self._closed = False

    @property
    def server_pid(self) -> int:
        """The id of the fork server."""
        return self._server.pid

    @property
    def pid(self) -> int | None:
        """The id of the agent; None until it is forked."""
        self._receive()
        return None if self._process is None else self._process.pid

    @property
    def is_over(self) -> bool:
        """Whether nobody needs the fork server for this agent any more."""
        return self._closed or self.has_ended()

    def has_ended(self, wait_s: float = 0.0) -> bool:
        """Return whether the agent has ended, or will never be forked.

        Args:
            wait_s: The longest wait for the end of an agent that is forked, s.
        """
        server_ended = self._server.poll() is not None
        self._receive()
        return server_ended or self._refused if self._process is None else self._process.has_ended(wait_s)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the agent, if it is forked."""
        self._receive()
        if self._process is not None:
            self._process.send(number)

    def terminate(self) -> None:
        """Ask the agent to end its ranks and then itself."""
        self.send(signal.SIGTERM)

    def end_server(self) -> None:
        """Kill a fork server that does not answer; the next agent starts another one."""
        self._server.kill()
        with suppress(subprocess.TimeoutExpired):
            self._server.wait(KILL_S)

    def close(self) -> None:
        """Kill the agent if it still runs, and forget it; the fork server kills one that it has not forked yet."""
        if self._closed:
            return
        self._reply.shutdown(socket.SHUT_RDWR)  # an answer that comes later fails
        self.send(signal.SIGKILL)
        self._closed = True
        self._reply.close()
        if self._process is not None:
            self._process.close()

    def _receive(self) -> None:
        """Take the fork server's answer, if it is there."""
        if self._process is None:
            with suppress(BlockingIOError):
                data, descriptors, _, _ = socket.recv_fds(self._reply, 64, 1)
                self._refused = not data
                if data:
                    self._process = ProcessHandle(int(data), descriptors[0])


@dataclass
class RunningForkServer:
    """One process of the fork server.

    Attributes:
        process: The process.
        orders: The socket for its orders.
        agents: The agents that it was asked for.
    """

    process: subprocess.Popen[bytes]
    orders: socket.socket
    agents: list[Agent] = field(default_factory=list)

    @classmethod
    def start(cls, order: AgentOrder, environment: Mapping[str, str]) -> RunningForkServer:
        """Start a process that imports what the ranks of its first order need."""
        own, others = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        variables = {**environment, **import_environment(), OWNER: str(os.getpid()), SOCKETS: order.sockets}
        command = [sys.executable, "-u", "-m", "harness.engines.fork_agent", str(others.fileno()), order.folder]
        with others, Path(order.log).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=variables,
                pass_fds=[others.fileno()],
                start_new_session=True,
            )
        return cls(process, own)

    @property
    def is_idle(self) -> bool:
        """Whether all of its agents are over."""
        self.agents = [agent for agent in self.agents if not agent.is_over]
        return not self.agents

    def end(self) -> None:
        """Kill the process; its agents and their ranks end with it."""
        self.orders.close()
        self.process.kill()
        self.process.wait(KILL_S)


class ForkServer:
    """Processes that fork agents, one for each environment: libraries read some variables only as they are loaded.

    A process starts with the first agent that needs it, and again if it was killed. All end with `close`, and also if
    the owner is killed. Use it as a context manager. It can serve one thread at a time.
    """

    def __init__(self) -> None:
        self._servers: dict[tuple[tuple[str, str], ...], RunningForkServer] = {}

    def start_agent(self, order: AgentOrder, environment: Mapping[str, str]) -> Agent:
        """Order an agent; return at once.

        Args:
            order: What to start.
            environment: The environment of the ranks.

        Returns:
            The agent.

        Raises:
            EngineGone: The system is not Linux, which ends processes with their parent.
        """
        if sys.platform != "linux":
            raise EngineGone("ranks of their own need Linux; use launch.mode=inprocess")
        server = self._server(order, environment)
        server.process.send_signal(signal.SIGCONT)  # one that somebody has stopped would keep ranks waiting
        own, others = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own.setblocking(False)
        with others, suppress(OSError):  # a server that has just died: the agent counts as ended
            socket.send_fds(server.orders, [msgspec.json.encode(order)], [others.fileno()])
        agent = Agent(server.process, own)
        server.agents.append(agent)
        return agent

    def close(self) -> None:
        """End every process, with its agents and their ranks. The next agent starts a new one."""
        servers, self._servers = self._servers, {}
        for server in servers.values():
            server.end()

    def __enter__(self) -> ForkServer:
        """Return this server."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process."""
        self.close()

    def _server(self, order: AgentOrder, environment: Mapping[str, str]) -> RunningForkServer:
        """Return a running server with this environment, the only one that has nothing to do."""
        key = tuple(sorted(item for item in environment.items() if not item[0].startswith(OTHERS_VARIABLES)))
        for other, server in list(self._servers.items()):
            if server.process.poll() is not None or (other != key and server.is_idle):
                self._servers.pop(other).end()
        if key not in self._servers:
            self._servers[key] = RunningForkServer.start(order, environment)
        return self._servers[key]
