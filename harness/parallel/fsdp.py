"""Weights sharded by FSDP2 over the ranks that would hold the same ones: a rank gathers a block to run it.

Source: PyTorch FSDP (Zhao et al. 2023, arXiv:2304.11277), `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather  # what set_custom_all_gather takes

from harness.device.malloc import return_freed
from harness.parallel.group import Group, TrafficCounter
from models.plan import ParallelPlan

TRAFFIC_KIND = "all_gather weights"


def apply_fsdp(network: nn.Module, plan: ParallelPlan, group: Group, device: torch.device) -> None:
    """Keep this rank's shard of every weight, in place, and move it to the device.

    Every block of the plan's stacks is gathered when it runs, and released after it. The parameters outside of blocks
    are gathered with the first forward. Here one block at a time is whole on the device. In a forward, the running
    block and the gathering buffers take the memory of about four blocks (measured on the CPU).

    Args:
        network: the whole network, on the device or the CPU.
        plan: the network's stacks of blocks.
        group: the ranks that hold the same weights.
        device: the device that computes.
    """
    assert group.handle is not None
    if device.type == "cpu":
        return_freed()  # gathered blocks fragment the heap, which would need more memory than sharding saves
    ignored = {parameter for name in plan.called_outside for parameter in network.get_submodule(name).parameters()}
    mesh, gather = DeviceMesh.from_group(group.handle, device.type), _CountedAllGather(group.traffic)
    for unit in fsdp_units(network, plan):
        unit.to(device)
        sharded = fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
        assert isinstance(sharded, FSDPModule)
        sharded.set_custom_all_gather(gather)


def fsdp_units(network: nn.Module, plan: ParallelPlan) -> Iterator[nn.Module]:
    """Yield the modules that are gathered at once: every block, then the network for its other parameters."""
    for stack in plan.stacks:
        yield from network.get_submodule(stack.blocks).children()
    yield network


class _CountedAllGather(AllGather):
    """FSDP's all-gather with its traffic counted; the time is that of the call, which on CUDA does not wait."""

    def __init__(self, traffic: TrafficCounter) -> None:
        self.traffic = traffic

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate the output of a gather."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        start = time.perf_counter()
        work = dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        sent = input_tensor.numel() * input_tensor.element_size() * (group.size() - 1)
        self.traffic.add(TRAFFIC_KIND, sent, start, time.perf_counter())
        return work
