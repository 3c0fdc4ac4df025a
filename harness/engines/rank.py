"""One rank, started by torchrun with exec or forked from its agent (harness.engines.fork_agent).

It reads the run's config.yaml, loads its components, and serves until a client asks it to stop.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from harness.config.bounds import MAX_IMAGES
from harness.config.tasks import TRAITS
from harness.config.yaml import ConfigError, from_yaml
from harness.engines.environment import OWNER, SOCKETS, threads_per_rank
from harness.engines.preimport import import_required
from harness.engines.processes import RANK_NAME, end_with_parent, set_process_name
from harness.engines.torchrun import RankError
from harness.loggers.level import LOG_FORMAT, set_log_level
from harness.messages import EngineInfo
from harness.parallel.mesh import RankPosition
from harness.plugins import load_sources
from harness.records.record import write_atomically
from harness.resolve.run import ResolvedRun
from harness.resolve.wait_policy import is_adaptive
from harness.serving.faults import failure_kind, failure_line, is_peer_lost
from harness.serving.transport import Addresses, router

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

log = logging.getLogger(__name__)


class StoreCancelFlags:
    """Cancel flags in the process group's key-value store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def set(self, request_id: str) -> None:
        """Mark a request as cancelled."""
        self._store.set(f"cancelled/{request_id}", "1")

    def is_set(self, request_id: str) -> bool:
        """Return whether a request is marked as cancelled."""
        return bool(self._store.check([f"cancelled/{request_id}"]))

    def clear(self, request_id: str) -> None:
        """Remove the mark."""
        self._store.delete_key(f"cancelled/{request_id}")


def main() -> None:
    """Run one rank under the launcher's torchrun."""
    if OWNER in os.environ:
        end_with_parent(int(os.environ[OWNER]))
    reset_signals()
    tempfile.tempdir = None  # an agent's is the folder of sockets
    folder, sockets = Path(sys.argv[1]), Path(os.environ[SOCKETS])
    rank = int(os.environ["RANK"])
    set_process_name(RANK_NAME.format(rank=rank))
    redirect_output(folder / "logs" / f"rank{rank}.log")
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    try:
        config = from_yaml((folder / "config.yaml").read_text())
        load_sources(config.plugin_sources)
        run = ResolvedRun(config)
        from harness.engines.rendezvous import join_ranks

        join_ranks(sockets)
        serve(run, Addresses(sockets))
    except Exception as error:
        write_error(folder / "logs", rank, error)
        sys.exit(1)


def reset_signals() -> None:
    """Restore Python's own signal handlers, in place of those of the agent that this rank was forked from."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def serve(run: ResolvedRun, addresses: Addresses) -> None:
    """Join the process group, load this rank's part, and serve requests until a client sends Shutdown.

    Args:
        run: the resolved run.
        addresses: the engine's addresses.

    Raises:
        ConfigError: torchrun started a number of ranks that differs from the layout's.
        CheckpointError: weights that cannot be loaded.
    """
    import torch.distributed as dist

    set_log_level(run.config.logger)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    log.info("rank %d of %d, process %d", rank, ranks, os.getpid())
    position = RankPosition(rank, run.degrees)
    check_world_size(position.world_size, ranks)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    try:
        _serve(run, addresses, position)
    finally:
        dist.destroy_process_group()


def check_world_size(layout: int, started: int) -> None:
    """Refuse a torchrun whose number of ranks differs from the layout's.

    Args:
        layout: the number of ranks of the layout.
        started: the number of ranks that torchrun started.

    Raises:
        ConfigError: the numbers differ; the message has both ways to make them equal.
    """
    if layout != started:
        raise ConfigError(
            f"the layout has {layout} ranks, torchrun started {started}; "
            f"use parallel.dp={started} or torchrun --nproc-per-node {layout}"
        )


def _serve(run: ResolvedRun, addresses: Addresses, position: RankPosition) -> None:
    config = run.config
    import_required(config)
    import torch
    import torch.distributed as dist
    import zmq

    from harness.build.native import attention_name
    from harness.device.device import pick_device
    from harness.device.spinning import adaptive_waits
    from harness.engines.loader import RankLoader
    from harness.parallel.collectives import Collectives, GlooCollectives, LocalCollectives, replica_collectives
    from harness.resolve.request import to_message
    from harness.serving.continuous_batching import ContinuousBatchScheduler
    from harness.serving.control import ControlThread, shutdown_listener
    from harness.serving.policy import estimated_work, evaluation_work, sort_key
    from harness.serving.replica import BatchLimits
    from harness.serving.request_queue import RequestQueue, check_with_limits
    from harness.serving.request_scheduler import RequestScheduler
    from harness.serving.speed import Capacity
    from harness.serving.transport import max_request_bytes

    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = pick_device(local_rank)
    serves = TRAITS[config.task.name].serves
    max_bytes = max_request_bytes(config.serve.max_images if serves else MAX_IMAGES)
    info = EngineInfo(
        "loading",
        position.world_size,
        pids=[os.getpid()],
        device=str(device),
        attention=attention_name(run, device),
        threads=threads_per_rank(config.launch, local_ranks),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        max_request_bytes=max_bytes,
    )
    context = zmq.Context()
    control = ControlThread(context, addresses, info) if position.rank == 0 else None
    try:
        collectives: Collectives = GlooCollectives() if position.world_size > 1 else LocalCollectives()
        if is_adaptive(config) and adaptive_waits(info.threads) is None and info.threads > 1:
            log.warning("this OpenMP library's waits cannot be changed: threads always spin for long")
        loader = RankLoader(position, device, collectives, info, int(os.environ["GROUP_RANK"]))
        loaded_info, worker = loader.load(run), loader.worker
        default_work = evaluation_work(to_message(config.request))
        request_scheduler: RequestScheduler | ContinuousBatchScheduler
        if serves and config.serve.max_batch > 1:
            limits = BatchLimits(config.serve.max_batch, default_work)
            request_scheduler = ContinuousBatchScheduler(
                worker, replica_collectives(position, collectives), context, addresses, limits
            )
        else:
            cancel_flags = StoreCancelFlags(dist.distributed_c10d._get_default_store())
            request_scheduler = RequestScheduler(worker, collectives, cancel_flags, loader)
        if control is None:
            request_scheduler.follow()
            return
        control.set_info(loaded_info)
        requests, wake = router(context, addresses.requests, max_bytes), shutdown_listener(context)
        if serves:
            serve = config.serve
            check = check_with_limits(worker.pipeline.check, serve)
            key = sort_key(serve.policy, estimated_work(to_message(config.request)), config.plugin)
            replicas = position.degrees[0]
            evaluations = worker.pipeline.validation.evaluations
            capacity = Capacity(evaluations, replicas, serve.max_evaluation_s, default_work)
            request_queue = RequestQueue(
                requests, wake, check, control, key, serve.max_queue, serve.timeout_s, capacity
            )
        else:
            assert isinstance(request_scheduler, RequestScheduler)
            configure = partial(request_scheduler.configure, on_change=control.set_info)
            request_queue = RequestQueue(
                requests, wake, lambda request: worker.pipeline.check(request), control, configure=configure
            )
        request_scheduler.lead(request_queue, control)
    finally:
        if control is not None:
            control.close()
        context.destroy(linger=1000)


def write_error(logs: Path, rank: int, error: Exception) -> None:
    """Write why this rank ends, for the process that started it."""
    traceback.print_exc()
    record = RankError(rank, failure_line(error), failure_kind(error), is_peer_lost(error))
    write_atomically(logs / f"rank{rank}.error.json", msgspec.json.encode(record))


def redirect_output(log: Path) -> None:
    """Send this process's standard output and error to its log, including those of C libraries."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    main()
