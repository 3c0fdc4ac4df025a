"""Under a torchrun of the user's own, on one machine or on several: `torchrun --nproc-per-node 2 -m harness
parallel=dp2`.

Every rank composes the same configuration; rank 0 alone claims the run's folder, and draws through a client thread of
its own while its main thread serves. The ranks of its node log in that folder; those of other nodes, which need not see
it, write to the output of their own torchrun.
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
from rich.console import Console

from harness.config.schema import RunConfig, Task
from harness.engines.environment import arithmetic_environment
from harness.engines.protocol import AttachedEngine, Engine
from harness.engines.rank import LOG_FORMAT, check_world_size, redirect_output, serve, write_error
from harness.engines.torchrun import rank_error
from harness.parallel.mesh import degrees, world_size
from harness.records.record import RunFolder, RunFolderError, Status
from harness.resolve.compose import ConfigError, ResolvedRun, compose_run, run_folder, to_yaml
from harness.serving.faults import failure_line
from harness.serving.transport import Addresses, EngineGone
from harness.tasks.generate import run_in
from harness.tasks.lifecycle import refuse
from harness.tasks.terminal import EXIT_BAD_INPUT, complain, exit_status

JOIN_S = 20.0
log = logging.getLogger(__name__)


class Assignment(msgspec.Struct, frozen=True):
    """What rank 0 tells the others before anything is loaded; `refusal` ends them all."""

    folder: str = ""
    sockets: str = ""
    refusal: str | None = None


class RanksEnded(BaseException):
    """torchrun asked this rank to end, because another one failed or the user stopped it."""


def run_under_torchrun(arguments: Sequence[str]) -> int:
    """One rank's whole life; the exit status."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a rank that refuses first must not cut off rank 0's word on it
    try:
        composed = _compose(arguments, ranks)
    except ConfigError as error:
        if rank == 0:
            refuse(run_folder(arguments), error)
        elif _speaks():
            complain(error)
        return EXIT_BAD_INPUT
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(arithmetic_environment(composed.config.launch, int(os.environ["LOCAL_WORLD_SIZE"])))
    import torch.distributed as dist

    from harness.parallel.collectives import Alone, Gloo

    dist.init_process_group("gloo")
    collectives = Gloo() if ranks > 1 else Alone()
    mine = _claim(composed) if rank == 0 else None
    told = msgspec.msgpack.decode(
        collectives.broadcast(None if mine is None else msgspec.msgpack.encode(mine)), type=Assignment
    )
    if told.refusal is not None:
        dist.destroy_process_group()
        if rank == 0 or _speaks():
            complain(told.refusal)
        return EXIT_BAD_INPUT
    folder, addresses = RunFolder(Path(told.folder)), Addresses(Path(told.sockets))
    if rank == 0:
        logging.basicConfig(level=logging.INFO, filename=folder.log_file(0), format=LOG_FORMAT)
        return _lead(composed, folder, addresses)
    return _follow(composed, folder if _node() == 0 else None, addresses, rank)


def _node() -> int:
    """Which of torchrun's agents started this rank; 0 started rank 0."""
    return int(os.environ["GROUP_RANK"])


def _speaks() -> bool:
    """Whether this rank says on its terminal what rank 0 says on its own: the first of another node."""
    return _node() > 0 and os.environ["LOCAL_RANK"] == "0"


def _follow(composed: ResolvedRun, folder: RunFolder | None, addresses: Addresses, rank: int) -> int:
    """Any other rank: serves, with its log in the run's folder where that is on its node; its exit status."""
    if folder is None:
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    else:
        redirect_output(folder.log_file(rank))
    try:
        serve(composed.config, addresses)
    except Exception as error:
        if folder is None:
            log.exception("rank %d of node %d: %s", rank, _node(), failure_line(error))
        else:
            write_error(folder.path / "logs", rank, error)
        return 1
    return 0


def _compose(arguments: Sequence[str], ranks: int) -> ResolvedRun:
    flags = [argument for argument in arguments if argument.startswith("-")]
    if flags:
        raise ConfigError(f"{flags[0]} does not go with torchrun; sweep outside: python -m harness -m ...")
    composed = compose_run(arguments)
    task = composed.config.task.name
    if task is Task.report:
        raise ConfigError(
            "task=report draws nothing, so it has no ranks; start it with python -m harness, not torchrun"
        )
    if task in (Task.train, Task.compare, Task.plan, Task.serve, Task.load):
        raise ConfigError(f"task={task.name} starts its own processes; start it with python -m harness, not torchrun")
    check_world_size(world_size(degrees(composed.config.parallel)), ranks)
    return composed


def _claim(composed: ResolvedRun) -> Assignment:
    try:
        folder = RunFolder.claim(composed.folder)
    except RunFolderError as error:
        return Assignment(refusal=str(error))
    folder.write_config(to_yaml(composed.config))
    return Assignment(str(folder.path.resolve()), str(Addresses.private().folder))


def _lead(composed: ResolvedRun, folder: RunFolder, addresses: Addresses) -> int:
    """Rank 0: serves in this thread, draws in another; the exit status of the run."""
    ended: list[BaseException] = []

    def check_alive() -> None:
        if ended:
            raise ended[0]

    def attach(config: RunConfig, folder: Path) -> Engine:
        return AttachedEngine(addresses, config.launch.start_timeout_s, dict(os.environ), check_alive)

    outcome: list[Status] = []
    client = threading.Thread(
        target=lambda: outcome.append(run_in(composed, folder, Console(), attach)), name="client", daemon=True
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ranks_ended)
    client.start()
    try:
        serve(composed.config, addresses)
        client.join()
    except (Exception, RanksEnded) as error:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        ended.append(_reason(error, folder.path / "logs"))
        client.join(JOIN_S)
    finally:
        addresses.remove()
    return exit_status(outcome[0]) if outcome else 1


def _reason(error: BaseException, logs: Path) -> BaseException:
    """What the client's request fails with, now that this rank no longer serves."""
    if isinstance(error, Exception):
        write_error(logs, 0, error)
    elif str(error) == signal.SIGINT.name:
        return KeyboardInterrupt()
    left = rank_error(logs)
    if left is not None:
        return EngineGone(f"rank {left.rank}: {left.message}", left.kind)
    return EngineGone("another rank died or torchrun was stopped; torchrun's output says which")


def _ranks_ended(number: int, frame: FrameType | None) -> None:
    raise RanksEnded(signal.Signals(number).name)
