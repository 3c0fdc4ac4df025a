"""What a client needs of an engine, whoever started it: start, draw, stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Protocol, TypeAlias, TypeVar

from harness.messages import EngineInfo, Failure, GenerationRequest, GenerationResult, Progress
from harness.serving.transport import Addresses, Connection

OnProgress: TypeAlias = Callable[[Progress], None]
Answer: TypeAlias = tuple[GenerationResult, list[bytes]]
T = TypeVar("T")


class RequestFailed(RuntimeError):
    """The engine answered with a Failure. `kind` is rejected, cancelled, oom, unsupported or failed."""

    def __init__(self, failure: Failure) -> None:
        where = f"rank {failure.rank}: " if failure.rank is not None else ""
        super().__init__(f"{where}{failure.message}")
        self.kind = failure.kind


class Engine(Protocol):
    """Ranks that draw. `environment` is theirs, `reused` the folder of the run that started them, where that is another
    one's.
    """

    environment: dict[str, str]
    reused: str | None

    def start(self, on_wait: Callable[[EngineInfo | None], None]) -> EngineInfo:
        """Returns once every rank is ready.

        Raises:
            EngineGone: a rank died, or was not ready in time.
        """

    def generate(self, request: GenerationRequest, on_progress: OnProgress) -> Answer:
        """Draws one request.

        Raises:
            RequestFailed: the engine's typed answer.
            EngineGone: a rank died.
        """

    def attend(self, clients: Callable[[Connection], T]) -> T:
        """Hands clients of many requests at once a connection of their own, which is closed when they are done.

        Raises:
            EngineGone: a rank died.
        """

    def stop(self) -> None:
        """Ends the engine; no process of it is left. Harmless when repeated."""


def exchange(connection: Connection, request: GenerationRequest, on_progress: OnProgress) -> Answer:
    """Sends one request and waits for its answer, passing its progress on. A Ctrl-C cancels it.

    Raises:
        RequestFailed: the engine's typed answer.
        EngineGone: the engine died first.
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
    """An engine that somebody else started, reached by its addresses; stopping it asks it to end in order.

    Args:
        addresses: where it listens.
        start_timeout_s: until it is ready.
        environment: of the ranks, for the record.
        check_alive: raises EngineGone once the engine is known to be dead.
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
        return self._connected().wait_ready(self._start_timeout_s, on_wait)

    def generate(self, request: GenerationRequest, on_progress: OnProgress) -> Answer:
        return exchange(self._connected(), request, on_progress)

    def attend(self, clients: Callable[[Connection], T]) -> T:
        with closing(Connection(self._addresses, self._check_alive)) as connection:
            return clients(connection)

    def stop(self) -> None:
        if self._connection is not None:
            self._connection.shutdown()
            self._connection.close()
            self._connection = None

    def _connected(self) -> Connection:
        if self._connection is None:
            raise RuntimeError("the engine was stopped; make a new one")
        return self._connection
