"""task=serve: the life of the server, from its socket to the end of its ranks.

The server listens before its ranks are ready, so that /ready can say what it waits for. On SIGTERM, SIGHUP or Ctrl-C it
takes no more requests, lets what runs end for serve.drain_s, answers the rest, and stops. A second Ctrl-C ends at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from contextlib import suppress
from functools import partial
from logging.handlers import WatchedFileHandler

from rich.console import Console
from rich.markup import escape

from harness.config.schema import RunConfig
from harness.config.serve import ServeConfig
from harness.engines.environment import OWNER
from harness.engines.fork_server import ForkServer
from harness.engines.processes import WATCH_S, is_alive
from harness.engines.torchrun import TorchrunEngine
from harness.records.record import INTERRUPTED, RunFolder, Status
from harness.resolve.compose import ConfigError, ResolvedRun, to_yaml
from harness.tasks.common.terminal import EXIT_INTERRUPTED
from harness.tasks.serve.access import AccessKeys
from harness.tasks.serve.app import make_app
from harness.tasks.serve.connections import BoundedServer, raise_descriptor_limit
from harness.tasks.serve.log_limit import limited_logs
from harness.tasks.serve.ranks import MakeSupervisedEngine
from harness.tasks.serve.service import GenerationService
from harness.tasks.serve.supervisor import Supervisor

LOG = "server.log"
ABORT_S = 0.7  # from a second Ctrl-C to the end of this process, whatever still hangs
BACKLOG = 512


class ServerLog(WatchedFileHandler):
    """A log file that is made again after its removal; a disk that takes no line ends nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Leave a line out that cannot be written."""


def listen(serve: ServeConfig) -> socket.socket:
    """Open the server's socket, before any process is started.

    Args:
        serve: The server's configuration, with its host and port.

    Returns:
        A listening socket.

    Raises:
        ConfigError: The address is taken, or does not belong to this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(serve.host, serve.port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(
            f"serve.host={serve.host} is not an address ({error.strerror}); give an address of this machine"
        ) from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"serve.port={serve.port} on {serve.host} cannot be used ({error.strerror}); choose another, or 0 for any"
        ) from error
    return found


def serve(
    run: ResolvedRun,
    folder: RunFolder,
    listening: socket.socket,
    make_engine: MakeSupervisedEngine | None = None,
    keys: AccessKeys | None = None,
) -> Status:
    """Serve in a claimed folder until SIGTERM, SIGHUP or Ctrl-C; every process has ended on return.

    Args:
        run: The run to serve.
        folder: The claimed run folder.
        listening: The socket of `listen`; it is closed at the end.
        make_engine: The function that starts a set of ranks; None for ranks that one fork server starts.
        keys: The server's keys, as `read_keys` returns them.

    Returns:
        The status of the run: failed if the ranks were given up, cancelled after a second Ctrl-C.

    Raises:
        EngineGone: The first ranks never became ready.
    """
    folder.write_config(to_yaml(run.config))
    os.umask(0o077)  # for this process and its ranks: nobody else reads logs, images and requests
    logs = limited_logs(ServerLog(folder.path / "logs" / LOG), run.config.logger)
    with listening, logs, ForkServer() as fork_server:
        make_engine = make_engine or partial(TorchrunEngine, fork_server=fork_server)
        supervisor = Supervisor(run.config, folder.path, make_engine)
        return asyncio.run(_serve(run.config, folder, listening, supervisor, keys))


async def _serve(
    config: RunConfig,
    folder: RunFolder,
    listening: socket.socket,
    supervisor: Supervisor,
    keys: AccessKeys | None,
) -> Status:
    app, console, stop = make_app(config, supervisor, folder.path, keys), Console(), asyncio.Event()
    server = BoundedServer(app, config.serve, raise_descriptor_limit())
    at_once = asyncio.Event()
    handle_signals(stop, at_once)
    service: GenerationService = app.state.service
    service.housekeeping.restore = partial(folder.restore, to_yaml(config))
    housekeeping = asyncio.create_task(service.housekeeping.run())
    http = asyncio.create_task(server.serve([listening]))
    name, path = escape(config.model.name), escape(str(folder.path))
    say(console, f"{name} on {server_url(listening)}, in {path}")
    ranks = asyncio.create_task(_start_ranks(supervisor, console))
    stopped, given_up = asyncio.create_task(stop.wait()), asyncio.create_task(supervisor.gave_up.wait())
    orphaned = asyncio.create_task(_stop_when_orphaned(int(os.environ.get(OWNER, "0")), stop))
    try:
        await asyncio.wait((http, ranks, stopped), return_when=asyncio.FIRST_COMPLETED)
        if ranks.done():
            ranks.result()
            await asyncio.wait((http, stopped, given_up), return_when=asyncio.FIRST_COMPLETED)
        given_up_for = supervisor.reason if supervisor.gave_up.is_set() else None
        say(console, "stopping")
    finally:
        stop.set()
        ending = asyncio.create_task(_end(config, supervisor, service, server, ranks, http))
        aborted = asyncio.create_task(at_once.wait())
        await asyncio.wait((ending, aborted), return_when=asyncio.FIRST_COMPLETED)
        if at_once.is_set():
            supervisor.abort()
            server.force_exit = True
            await asyncio.wait((ending,), timeout=ABORT_S)
        if not ending.done():
            folder.finish(INTERRUPTED)
            os._exit(EXIT_INTERRUPTED)
        for task in (stopped, given_up, orphaned, housekeeping, aborted):
            task.cancel()
        ending.result()
    if at_once.is_set():
        return Status("cancelled", "interrupted")
    return Status("ok") if given_up_for is None else Status("failed", given_up_for)


def handle_signals(stop: asyncio.Event, at_once: asyncio.Event) -> None:
    """Set an event at SIGTERM, SIGHUP and Ctrl-C, and another one at a Ctrl-C after that.

    Args:
        stop: The event that stops the server in order.
        at_once: The event that ends it at once.
    """

    def interrupt() -> None:
        (at_once if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, interrupt)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        loop.add_signal_handler(signal.SIGHUP, stop.set)


async def _end(
    config: RunConfig,
    supervisor: Supervisor,
    service: GenerationService,
    server: BoundedServer,
    ranks: asyncio.Task[None],
    http: asyncio.Task[None],
) -> None:
    """End the server in order: requests, ranks, what is being saved, connections."""
    await supervisor.stop(config.serve.drain_s)
    await asyncio.gather(ranks, return_exceptions=True)
    await service.close()
    server.should_exit = True
    await http


def say(console: Console, line: str) -> None:
    """Print a line on the terminal, which may have been closed."""
    with suppress(OSError):
        console.print(line, soft_wrap=True)


async def _stop_when_orphaned(owner: int, stop: asyncio.Event) -> None:
    """Stop the server when the process that started it for its own task is gone, even after SIGKILL.

    Args:
        owner: The id of that process; 0 if there is none.
        stop: The event that stops the server.
    """
    while owner and is_alive(owner):
        await asyncio.sleep(WATCH_S)
    if owner:
        stop.set()


async def _start_ranks(supervisor: Supervisor, console: Console) -> None:
    """Start the ranks and print a line when they are ready.

    Args:
        supervisor: The supervisor of the ranks.
        console: The console for the line.

    Raises:
        EngineGone: The ranks never became ready.
    """
    await supervisor.start()
    if supervisor.info is not None:
        say(console, f"ready on {supervisor.info.world_size} ranks; Ctrl-C stops")


def server_url(listening: socket.socket) -> str:
    """Return the URL of the server for a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
