"""The process groups of a rank, from its position on one DeviceMesh with the axes dp, cfg, tp, ring and ulysses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Backend
from torch.distributed.device_mesh import init_device_mesh

from harness.device.cuda import synchronizer
from harness.parallel.group import Group, TrafficCounter, single_process_group
from harness.parallel.mesh import AXES, RankPosition

AGREE = timedelta(seconds=5)
"""The longest wait for the other ranks of a replica to raise, too; those that do are milliseconds apart."""


@dataclass(frozen=True)
class ProcessGroups:
    """The process groups of one rank.

    Args:
        cfg: the ranks of the guidance branches.
        tp: the ranks with slices of one network.
        ring: the ranks that pass keys and values on, or patches in a pipeline.
        ulysses: the ranks that share heads.
        tokens: the ranks that share the tokens of an image: ring x ulysses, ulysses innermost.
        weights: the ranks that hold the same weights of an image's network: cfg x ring x ulysses.
        replica: all ranks that compute one image together: cfg x tp x ring x ulysses.
        traffic: the count of what this rank has sent in any of the groups.
        any_in_replica: a collective that returns whether a flag is set on any rank of `replica`.
        all_raise: a function that a rank calls when it has raised an exception. It returns whether every rank of
            `replica` called it within AGREE, so that no rank waits for another one in a collective.
    """

    cfg: Group
    tp: Group
    ring: Group
    ulysses: Group
    tokens: Group
    weights: Group
    replica: Group
    traffic: TrafficCounter
    any_in_replica: Callable[[bool], bool]
    all_raise: Callable[[], bool] = lambda: True


def single_rank_groups() -> ProcessGroups:
    """Return the groups at world size 1."""
    group = single_process_group()
    return ProcessGroups(group, group, group, group, group, group, group, group.traffic, lambda flag: flag)


def make_process_groups(position: RankPosition, device: torch.device, timeout: timedelta) -> ProcessGroups:
    """Create the groups of this rank; all ranks of the world call it at the same time.

    Args:
        position: this rank's position on the mesh.
        device: the device of the tensors that the ranks exchange.
        timeout: the longest wait for another rank, here and in a collective; a rank that dies ends the wait at once.

    Returns:
        The groups.
    """
    if position.world_size == 1:
        return single_rank_groups()
    backend = _backend(device, timeout)
    mesh = init_device_mesh(
        device.type, position.degrees, mesh_dim_names=AXES, backend_override=dict.fromkeys(AXES, backend)
    )
    traffic = TrafficCounter()
    synchronize = synchronizer(device)

    def group(*names: str) -> Group:
        part = mesh[names] if len(names) == 1 else mesh[names]._flatten("_".join(names), backend_override=backend)
        handle = part.get_group()
        return Group(dist.get_process_group_ranks(handle), position.rank, handle, traffic, synchronize)

    replica = group("cfg", "tp", "ring", "ulysses")
    return ProcessGroups(
        group("cfg"),
        group("tp"),
        group("ring"),
        group("ulysses"),
        group("ring", "ulysses"),
        group("cfg", "ring", "ulysses"),
        replica,
        traffic,
        _make_any_in_replica(position, timeout),
        _make_all_raise(position, timeout),
    )


def _backend(device: torch.device, timeout: timedelta) -> tuple[str, Backend.Options]:
    """Return NCCL between GPUs and gloo between CPUs; DeviceMesh takes a timeout only in their options."""
    if device.type == "cuda":
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        return "nccl", options
    return "gloo", Backend.Options("gloo", timeout)


def new_replica_group(position: RankPosition, timeout: timedelta) -> dist.ProcessGroup:
    """Create a gloo group for every replica; all ranks of the world call it at the same time.

    Args:
        position: this rank's position on the mesh.
        timeout: the longest wait for another rank.

    Returns:
        The group of this rank's replica.
    """
    firsts = range(0, position.world_size, position.replica_size)
    ranks = [list(range(first, first + position.replica_size)) for first in firsts]
    return [dist.new_group(each, backend="gloo", timeout=timeout) for each in ranks][position.replica]


def _make_any_in_replica(position: RankPosition, timeout: timedelta) -> Callable[[bool], bool]:
    """Create the agreement on a flag: over gloo on the CPU, one byte per rank, outside of the counted traffic."""
    group = new_replica_group(position, timeout)

    def any_in_replica(flag: bool) -> bool:
        if position.replica_size == 1:
            return flag
        reduced = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=group)
        return bool(reduced)

    return any_in_replica


def _make_all_raise(position: RankPosition, timeout: timedelta) -> Callable[[], bool]:
    """Create the agreement of ranks that have raised an exception, over a gloo group that nothing else uses."""
    group = new_replica_group(position, timeout)

    def all_raise() -> bool:
        if position.replica_size == 1:
            return True
        try:
            work = dist.all_reduce(torch.zeros(1), group=group, async_op=True)
            return work is not None and bool(work.wait(AGREE))
        except RuntimeError:  # no answer in time, or a rank has ended
            return False

    return all_raise
