"""The engine protocol, whoever started the engine: start, generate, stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Protocol, TypeAlias, TypeVar

from harness.config.schema import RunConfig
from harness.config.yaml import to_yaml
from harness.messages import Configure, EngineInfo, Failure, GenerationRequest, GenerationResult, Progress
from harness.serving.transport import Addresses, Connection, EngineGone

OnProgress: TypeAlias = Callable[[Progress], None]
Answer: TypeAlias = tuple[GenerationResult, list[bytes]]
T = TypeVar("T")


class RequestFailed(RuntimeError):
    """The engine answered with a Failure. `kind` is rejected, cancelled, oom, unsupported or failed."""

    def __init__(self, failure: Failure) -> None:
        prefix = f"rank {failure.rank}: " if failure.rank is not None else ""
        super().__init__(f"{prefix}{failure.message}")
        self.kind = failure.kind


class Engine(Protocol):
    """Ranks that generate images.

    Attributes:
        environment: the environment variables of the ranks.
        reused: the folder of the run that started the ranks, if it was another run.
    """

    environment: dict[str, str]
    reused: str | None

    def start(self, on_wait: Callable[[EngineInfo | None], None]) -> EngineInfo:
        """Start the ranks and wait until every rank is ready.

        Args:
            on_wait: a callback that receives the engine's state while it loads.

        Raises:
            EngineGone: a rank died, or was not ready in time.
        """

    def generate(self, request: GenerationRequest, on_progress: OnProgress) -> Answer:
        """Run one request.

        Args:
            request: the request.
            on_progress: a callback that receives the request's progress.

        Raises:
            RequestFailed: the engine's typed answer.
            EngineGone: a rank died.
        """

    def with_connection(self, clients: Callable[[Connection], T]) -> T:
        """Call a function with a connection of its own, for many requests at once, and close the connection afterwards.

        Args:
            clients: a function that sends requests over the connection.

        Raises:
            EngineGone: a rank died.
        """

    def stop(self) -> None:
        """End the engine; no process of it is left. A second call does nothing."""


class WarmEngine(Engine, Protocol):
    """An engine whose ranks can change to another configuration between two requests."""

    def configure(self, config: RunConfig) -> EngineInfo:
        """Change to a configuration with an equal `process_key`, and wait until every rank is ready.

        Args:
            config: the resolved configuration.

        Raises:
            RequestFailed: the ranks refused it, and run what they ran.
            EngineGone: a rank died, for instance of weights that cannot be loaded, or was not ready in time.
        """


def configure_and_wait(connection: Connection, config: RunConfig) -> EngineInfo:
    """Send a configuration to the ranks of an engine and wait until every rank is ready.

    Args:
        connection: the connection to the engine.
        config: the resolved configuration.

    Returns:
        The engine's state.

    Raises:
        RequestFailed: the ranks refused it.
        EngineGone: the engine died first, or was not ready in time.
    """
    timeout_s = config.launch.start_timeout_s
    deadline = time.monotonic() + timeout_s
    no_prompts = [""] * len(config.request.prompts or [""])  # requests bring theirs, which may be long
    request = replace(config.request, prompt=None, prompts=no_prompts, negative_prompt="")
    connection.send(Configure(to_yaml(replace(config, request=request))))
    while time.monotonic() < deadline:
        message = connection.receive_within(deadline - time.monotonic())
        if isinstance(message, EngineInfo):
            return message
        if isinstance(message, Failure) and not message.request_id:
            raise RequestFailed(message)
    raise EngineGone(f"the engine had not changed within {timeout_s:g} s; raise launch.start_timeout_s")


def send_and_wait(connection: Connection, request: GenerationRequest, on_progress: OnProgress) -> Answer:
    """Send one request and wait for its answer, passing its progress on. A Ctrl-C cancels the request.

    Args:
        connection: the connection to the engine.
        request: the request.
        on_progress: a callback that receives the request's progress.

    Returns:
        The result and its frames.

    Raises:
        RequestFailed: the engine's typed answer.
        EngineGone: the engine died first.
        KeyboardInterrupt: a Ctrl-C, raised again once the request is cancelled.
    """
    connection.send(request)
    try:
        while True:
            message, frames = connection.receive()
            if isinstance(message, Progress) and message.request_id == request.request_id:
                on_progress(message)
            elif isinstance(message, GenerationResult) and message.request_id == request.request_id:
                return message, frames
            elif isinstance(message, Failure) and message.request_id in (request.request_id, ""):
                raise RequestFailed(message)
    except KeyboardInterrupt:
        connection.cancel(request.request_id)
        raise


class AttachedEngine:
    """An engine that another process started, reached by its addresses; stopping it asks it to end in order.

    Args:
        addresses: the engine's addresses.
        start_timeout_s: the time limit until it is ready, s.
        environment: the ranks' environment variables, for the record.
        check_alive: a function that raises EngineGone if the engine is dead.
    """

    def __init__(
        self,
        addresses: Addresses,
        start_timeout_s: float,
        environment: dict[str, str],
        check_alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.environment = environment
        self.reused: str | None = None
        self._addresses = addresses
        self._check_alive = check_alive
        self._connection: Connection | None = Connection(addresses, check_alive)
        self._start_timeout_s = start_timeout_s

    def start(self, on_wait: Callable[[EngineInfo | None], None]) -> EngineInfo:
        """Wait until every rank is ready."""
        return self._connected().wait_ready(self._start_timeout_s, on_wait)

    def generate(self, request: GenerationRequest, on_progress: OnProgress) -> Answer:
        """Send one request and wait for its answer."""
        return send_and_wait(self._connected(), request, on_progress)

    def with_connection(self, clients: Callable[[Connection], T]) -> T:
        """Call a function with a new connection, closed afterwards."""
        with closing(Connection(self._addresses, self._check_alive)) as connection:
            return clients(connection)

    def stop(self) -> None:
        """Ask the engine to end in order and close the connection."""
        if self._connection is not None:
            self._connection.shutdown()
            self._connection.close()
            self._connection = None

    def _connected(self) -> Connection:
        if self._connection is None:
            raise RuntimeError("the engine was stopped; make a new one")
        return self._connection
