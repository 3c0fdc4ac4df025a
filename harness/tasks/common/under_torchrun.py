"""A run under the user's own torchrun: `torchrun --nproc-per-node 2 -m harness parallel=dp2`, on one or more machines.

Every rank composes the same configuration. Rank 0 alone claims the run's folder. It generates through a client thread
of its own while its main thread serves. The ranks on the node of rank 0 write their logs in that folder. Ranks on
other nodes, which may not see the folder, write to the output of their own torchrun.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import msgspec

from harness.config.schema import RunConfig
from harness.config.tasks import TRAITS
from harness.engines.environment import arithmetic_environment
from harness.engines.protocol import AttachedEngine, Engine
from harness.engines.rank import check_world_size, redirect_output, serve, write_error
from harness.engines.torchrun import rank_error
from harness.loggers.level import LOG_FORMAT
from harness.loggers.wandb import check_connection
from harness.records.record import RunFolder, RunFolderError, Status
from harness.resolve.command import parse_command
from harness.resolve.compose import ConfigError, ResolvedRun, compose_run, to_yaml
from harness.serving.faults import failure_line
from harness.serving.transport import Addresses, EngineGone, SocketFolderError
from harness.tasks import task_entry
from harness.tasks.common.lifecycle import claim, refuse_command
from harness.tasks.common.measure import execute
from harness.tasks.common.terminal import EXIT_BAD_INPUT, exit_status, output_console, print_error

JOIN_S = 20.0
log = logging.getLogger(__name__)


class Assignment(msgspec.Struct, frozen=True):
    """The message from rank 0 to all ranks before anything is loaded.

    Attributes:
        folder: The run's folder.
        sockets: Folder of the sockets that client and ranks use.
        refusal: Reason why the run cannot start; it ends all ranks.
    """

    folder: str = ""
    sockets: str = ""
    refusal: str | None = None


class RankStopped(BaseException):
    """torchrun stopped this rank, because another rank failed or the user interrupted it."""


def run_under_torchrun(arguments: Sequence[str]) -> int:
    """Run one rank from start to end.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The exit status.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a rank that refuses first must not stop rank 0 before its message
    try:
        run = _compose(arguments, ranks)
    except ConfigError as error:
        if rank == 0:
            refuse_command(arguments, error)
        elif _reports_for_node():
            print_error(error)
        return EXIT_BAD_INPUT
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(arithmetic_environment(run.config.launch, int(os.environ["LOCAL_WORLD_SIZE"])))
    import torch.distributed as dist

    from harness.parallel.collectives import GlooCollectives, LocalCollectives

    dist.init_process_group("gloo")
    collectives = GlooCollectives() if ranks > 1 else LocalCollectives()
    own_assignment = _claim(run) if rank == 0 else None
    assignment = msgspec.msgpack.decode(
        collectives.broadcast(None if own_assignment is None else msgspec.msgpack.encode(own_assignment)),
        type=Assignment,
    )
    if assignment.refusal is not None:
        dist.destroy_process_group()
        if rank == 0 or _reports_for_node():
            print_error(assignment.refusal)
        return EXIT_BAD_INPUT
    folder, addresses = RunFolder(Path(assignment.folder)), Addresses(Path(assignment.sockets))
    if rank == 0:
        logging.basicConfig(filename=folder.log_file(0), format=LOG_FORMAT)
        return _run_rank_zero(run, folder, addresses)
    return _run_other_rank(run, folder if _node() == 0 else None, addresses, rank)


def _node() -> int:
    """Return the index of the torchrun agent that started this rank; agent 0 started rank 0."""
    return int(os.environ["GROUP_RANK"])


def _reports_for_node() -> bool:
    """Return whether this rank repeats rank 0's messages on its own terminal: the first rank of any other node does."""
    return _node() > 0 and os.environ["LOCAL_RANK"] == "0"


def _run_other_rank(run: ResolvedRun, folder: RunFolder | None, addresses: Addresses, rank: int) -> int:
    """Serve as a rank other than 0.

    Args:
        run: The resolved run.
        folder: The run's folder, which takes the log; None if the rank is on another node.
        addresses: Addresses of the sockets.
        rank: Global rank.

    Returns:
        The exit status of the rank.
    """
    if folder is None:
        logging.basicConfig(format=LOG_FORMAT)
    else:
        redirect_output(folder.log_file(rank))
    try:
        serve(run, addresses)
    except Exception as error:
        if folder is None:
            log.exception("rank %d of node %d: %s", rank, _node(), failure_line(error))
        else:
            write_error(folder.path / "logs", rank, error)
        return 1
    return 0


def _compose(arguments: Sequence[str], ranks: int) -> ResolvedRun:
    command = parse_command(arguments).without_flags("torchrun")
    run = compose_run(command.overrides, command.search)
    task = run.config.task.name
    if (reason := TRAITS[task].not_under_torchrun) is not None:
        raise ConfigError(f"task={task.name} {reason}; start it with python -m harness, not torchrun")
    task_entry(task).check(run)
    check_world_size(run.world_size, ranks)
    return run


def _claim(run: ResolvedRun) -> Assignment:
    try:
        check_connection(run.config.logger.wandb)
        folder = claim(run)
        folder.write_config(to_yaml(run.config))
        return Assignment(str(folder.path.resolve()), str(Addresses.private().folder))
    except (ConfigError, RunFolderError, SocketFolderError) as error:
        return Assignment(refusal=str(error))


def _run_rank_zero(run: ResolvedRun, folder: RunFolder, addresses: Addresses) -> int:
    """Serve in this thread and generate in another one.

    Args:
        run: The resolved run.
        folder: The claimed folder.
        addresses: Addresses of the sockets.

    Returns:
        The exit status of the run.
    """
    errors: list[BaseException] = []

    def check_alive() -> None:
        if errors:
            raise errors[0]

    def attach(config: RunConfig, folder: Path) -> Engine:
        return AttachedEngine(addresses, config.launch.start_timeout_s, dict(os.environ), check_alive)

    outcome: list[Status] = []
    client = threading.Thread(
        target=lambda: outcome.append(execute(run, output_console(), attach, folder)), name="client", daemon=True
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _raise_rank_stopped)
    client.start()
    try:
        serve(run, addresses)
        client.join()
    except (Exception, RankStopped) as error:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        errors.append(_client_error(error, folder.path / "logs"))
        client.join(JOIN_S)
    finally:
        addresses.remove()
    return exit_status(outcome[0]) if outcome else 1


def _client_error(error: BaseException, logs: Path) -> BaseException:
    """Return the error for the client's request, now that this rank no longer serves."""
    if isinstance(error, Exception):
        write_error(logs, 0, error)
    elif str(error) == signal.SIGINT.name:
        return KeyboardInterrupt()
    left = rank_error(logs)
    if left is not None:
        return EngineGone(f"rank {left.rank}: {left.message}", left.kind)
    return EngineGone("another rank died or torchrun was stopped; torchrun's output says which")


def _raise_rank_stopped(number: int, frame: FrameType | None) -> None:
    raise RankStopped(signal.Signals(number).name)
