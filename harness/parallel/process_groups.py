"""From a rank's place to the groups that it computes with, on one DeviceMesh named dp, cfg, tp, ring, ulysses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Backend
from torch.distributed.device_mesh import init_device_mesh

from harness.device.cuda import synchronizer
from harness.parallel.group import Group, Traffic, alone
from harness.parallel.mesh import AXES, Place


@dataclass(frozen=True)
class Axes:
    """The groups of one rank.

    Args:
        cfg: the ranks of the guidance branches.
        tp: ranks with slices of one network.
        ring: ranks that pass keys and values on, or in a pipeline patches.
        ulysses: ranks that share heads.
        tokens: ranks that share the tokens of a picture: ring x ulysses, ulysses innermost.
        weights: ranks that hold the same weights of a picture's network: cfg x ring x ulysses.
        picture: all ranks that compute one picture: cfg x tp x ring x ulysses.
        traffic: what this rank has sent to any of them.
        any_of_picture: whether a flag is up on any rank of `picture`.
    """

    cfg: Group
    tp: Group
    ring: Group
    ulysses: Group
    tokens: Group
    weights: Group
    picture: Group
    traffic: Traffic
    any_of_picture: Callable[[bool], bool]


def one_rank() -> Axes:
    """The axes of world size 1."""
    group = alone()
    return Axes(group, group, group, group, group, group, group, group.traffic, lambda flag: flag)


def connect(place: Place, device: torch.device, timeout: timedelta) -> Axes:
    """The groups of this rank; every rank of the world calls it at once.

    Args:
        place: of this rank.
        device: where the tensors are that they exchange.
        timeout: longest wait for another rank, here and in a collective; one that died ends the wait at once.
    """
    if place.world_size == 1:
        return one_rank()
    backend = _backend(device, timeout)
    mesh = init_device_mesh(
        device.type, place.degrees, mesh_dim_names=AXES, backend_override=dict.fromkeys(AXES, backend)
    )
    traffic = Traffic()
    synchronize = synchronizer(device)

    def group(*names: str) -> Group:
        part = mesh[names] if len(names) == 1 else mesh[names]._flatten("_".join(names), backend_override=backend)
        handle = part.get_group()
        return Group(dist.get_process_group_ranks(handle), place.rank, handle, traffic, synchronize)

    picture = group("cfg", "tp", "ring", "ulysses")
    return Axes(
        group("cfg"),
        group("tp"),
        group("ring"),
        group("ulysses"),
        group("ring", "ulysses"),
        group("cfg", "ring", "ulysses"),
        picture,
        traffic,
        _agreement(place, timeout),
    )


def _backend(device: torch.device, timeout: timedelta) -> tuple[str, Backend.Options]:
    """NCCL between GPUs, gloo between processors; DeviceMesh takes a timeout in their options only."""
    if device.type == "cuda":
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        return "nccl", options
    return "gloo", Backend.Options("gloo", timeout)


def _agreement(place: Place, timeout: timedelta) -> Callable[[bool], bool]:
    """Over gloo on the CPU, outside the counted traffic: one byte a rank."""
    mine = None
    for first in range(0, place.world_size, place.replica_size):
        ranks = list(range(first, first + place.replica_size))
        handle = dist.new_group(ranks, backend="gloo", timeout=timeout)
        mine = handle if place.rank in ranks else mine

    def any_of_picture(flag: bool) -> bool:
        if place.replica_size == 1:
            return flag
        up = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(up, op=dist.ReduceOp.MAX, group=mine)
        return bool(up)

    return any_of_picture
