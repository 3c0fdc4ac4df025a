"""Weights dealt over the ranks that would hold the same ones, by FSDP2: each has a part, and gathers a block to run it.

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
from harness.parallel.group import Group, Traffic
from models.plan import ParallelPlan

KIND = "all_gather weights"


def shard_weights(network: nn.Module, plan: ParallelPlan, group: Group, device: torch.device) -> None:
    """Leaves this rank its part of every weight, in place, and takes that to the device.

    Every block of the plan's stacks is gathered as it runs and let go behind it, the parameters outside of them with
    the first. Here a block at a time is whole on the device; in a forward, one that runs and what gathering keeps take
    the memory of about four (measured on the CPU).

    Args:
        network: whole, on the device or the CPU.
        plan: of its folder.
        group: the ranks that hold the same weights.
        device: where it computes.
    """
    assert group.handle is not None
    if device.type == "cpu":
        return_freed()  # a heap that gathered blocks break into pieces takes more memory than dealing them spares
    kept = {parameter for name in plan.called_outside for parameter in network.get_submodule(name).parameters()}
    mesh, gather = DeviceMesh.from_group(group.handle, device.type), _Counted(group.traffic)
    for unit in units(network, plan):
        unit.to(device)
        sharded = fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        assert isinstance(sharded, FSDPModule)
        sharded.set_custom_all_gather(gather)


def units(network: nn.Module, plan: ParallelPlan) -> Iterator[nn.Module]:
    """What is gathered at once: every block, then the network for what lies outside of them."""
    for stack in plan.stacks:
        yield from network.get_submodule(stack.blocks).children()
    yield network


class _Counted(AllGather):
    """FSDP's own gathering, counted. Its time is what the call blocks for: on CUDA it runs beside the computation."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        start = time.perf_counter()
        work = dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        sent = input_tensor.numel() * input_tensor.element_size() * (group.size() - 1)
        self.traffic.add(KIND, sent, (time.perf_counter() - start) * 1e3)
        return work
