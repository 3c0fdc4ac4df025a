"""One rank, which torchrun starts by exec or forks from its agent (harness.engines.fork_agent).

It reads the run's config.yaml, loads, and serves until a client asks it to stop.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from harness.config.schema import RunConfig, Task
from harness.config.yaml import ConfigError, from_yaml
from harness.engines.environment import OWNER, SOCKETS, threads_per_rank
from harness.engines.preimport import import_parts
from harness.engines.processes import is_alive
from harness.engines.torchrun import RankError
from harness.messages import EngineInfo, LoadedComponent
from harness.parallel.mesh import Place, degrees
from harness.records.record import write_atomically
from harness.serving.faults import failure_kind, failure_line, is_peer_lost
from harness.serving.transport import Addresses, router

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

WATCH_S = 0.5
log = logging.getLogger(__name__)
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class RankFacts(msgspec.Struct, frozen=True):
    """What a rank says of itself once it has loaded."""

    pid: int
    load_ms: float
    loaded: list[LoadedComponent] = []
    ceiling_tflops: float = 0.0
    node: int = 0
    host: str = ""


class StoreBoard:
    """Cancellations over the process group's key-value store: rank 0 posts, every rank looks between two steps."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def post(self, request_id: str) -> None:
        self._store.set(f"cancelled/{request_id}", "1")

    def is_posted(self, request_id: str) -> bool:
        return bool(self._store.check([f"cancelled/{request_id}"]))


def main() -> None:
    """Entry point under the launcher's torchrun."""
    reset_signals()
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    redirect_output(folder / "logs" / f"rank{rank}.log")
    watch_parents(int(os.environ.get(OWNER, "0")))
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    try:
        log.info("rank %d of %s, process %d", rank, os.environ["WORLD_SIZE"], os.getpid())
        serve(from_yaml((folder / "config.yaml").read_text()), Addresses(Path(os.environ[SOCKETS])))
    except Exception as error:
        leave_error(folder / "logs", rank, error)
        sys.exit(1)


def reset_signals() -> None:
    """Python's own handlers, in place of those of the agent that this rank was forked from."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def serve(config: RunConfig, addresses: Addresses) -> None:
    """Joins the process group, loads this rank's part, and takes requests until a client says Shutdown.

    Raises:
        ConfigError: torchrun started another number of ranks than the layout has.
        CheckpointError: weights that cannot be loaded.
    """
    import torch.distributed as dist

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = Place(rank, degrees(config.parallel))
    check_ranks(place.world_size, ranks)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    try:
        _serve(config, addresses, place)
    finally:
        dist.destroy_process_group()


def check_ranks(layout: int, started: int) -> None:
    """Refuses a torchrun of another number of ranks than the layout has.

    Raises:
        ConfigError: with both ways to make them equal.
    """
    if layout != started:
        raise ConfigError(
            f"the layout has {layout} ranks, torchrun started {started}; "
            f"use parallel.dp={started} or torchrun --nproc-per-node {layout}"
        )


def _serve(config: RunConfig, addresses: Addresses, place: Place) -> None:
    import_parts(config)
    import torch.distributed as dist
    import zmq

    from harness.build.native import attention_name
    from harness.build.worker import build_worker, ceiling
    from harness.device.device import pick_device, prepare_cpu
    from harness.parallel.collectives import Alone, Collectives, Gloo
    from harness.serving.control import ControlThread, listener
    from harness.serving.request_queue import Inbox, served_check
    from harness.serving.policy import key_of
    from harness.serving.request_scheduler import RequestScheduler
    from harness.serving.continuous_batching import StepScheduler

    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = pick_device(local_rank)
    info = EngineInfo(
        "loading",
        place.world_size,
        pids=[os.getpid()],
        device=str(device),
        attention=attention_name(config, device),
        threads=threads_per_rank(config.launch, local_ranks),
    )
    context = zmq.Context()
    control = ControlThread(context, addresses, info) if place.rank == 0 else None
    try:
        collectives: Collectives = Gloo() if place.world_size > 1 else Alone()
        start = time.perf_counter()
        prepare_cpu(config, info.threads)
        worker = build_worker(config, place, device)
        load_ms = (time.perf_counter() - start) * 1e3
        collectives.gather([])  # all have loaded, so that all measure at once
        node, host = int(os.environ["GROUP_RANK"]), socket.gethostname()
        mine = RankFacts(os.getpid(), load_ms, worker.loaded, ceiling(config, device), node, host)
        gathered = collectives.gather([msgspec.msgpack.encode(mine)])
        facts = [msgspec.msgpack.decode(frames[0], type=RankFacts) for frames in gathered]
        serves = config.task.name in (Task.serve, Task.load)
        request_scheduler: RequestScheduler | StepScheduler
        if serves and config.serve.max_batch > 1:
            request_scheduler = StepScheduler(worker, collectives, config.serve.max_batch)
        else:
            board = StoreBoard(dist.distributed_c10d._get_default_store())
            request_scheduler = RequestScheduler(worker, collectives, board)
        if control is None:
            request_scheduler.follow()
            return
        pids, load_ms = [f.pid for f in facts], max(f.load_ms for f in facts)
        loaded, ceilings = slowest([f.loaded for f in facts]), [f.ceiling_tflops for f in facts]
        hosts = list({f.node: f.host for f in facts}.values())
        control.set_info(
            msgspec.structs.replace(
                info, pids=pids, load_ms=load_ms, loaded=loaded, ceiling_tflops=ceilings, hosts=hosts
            )
        )
        requests, wake = router(context, addresses.requests), listener(context)
        if serves:
            check = served_check(worker.pipeline.check, config.serve)
            key, limit, timeout_s = key_of(config.serve.policy), config.serve.max_queue, config.serve.timeout_s
            inbox = Inbox(requests, wake, check, control, key, limit, timeout_s)
        else:
            inbox = Inbox(requests, wake, worker.pipeline.check, control)
        request_scheduler.lead(inbox, control)
    finally:
        if control is not None:
            control.close()
        context.destroy(linger=1000)


def slowest(ranks: list[list[LoadedComponent]]) -> list[LoadedComponent]:
    """Rank 0's components, each with the time of the rank that took longest."""
    times: dict[str, float] = {}
    for part in (part for rank in ranks for part in rank):
        times[part.component] = max(part.load_ms, times.get(part.component, 0.0))
    return [msgspec.structs.replace(part, load_ms=times[part.component]) for part in ranks[0]]


def leave_error(logs: Path, rank: int, error: Exception) -> None:
    """Writes why this rank ends, for whoever started it."""
    traceback.print_exc()
    left = RankError(rank, failure_line(error), failure_kind(error), is_peer_lost(error))
    write_atomically(logs / f"rank{rank}.error.json", msgspec.json.encode(left))


def redirect_output(log: Path) -> None:
    """Sends this process's standard output and error to its log, C libraries' included."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def watch_parents(owner: int) -> None:
    """Ends this process when torchrun, or the process that started it, is gone: also after their SIGKILL."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and (owner == 0 or is_alive(owner)):
            time.sleep(WATCH_S)
        if SOCKETS in os.environ:  # nobody else is left to remove it
            shutil.rmtree(os.environ[SOCKETS], ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="watch-parents", daemon=True).start()


if __name__ == "__main__":
    main()
