"""Queries, keys and values of one token stream from a single linear, whose rows are those of the three."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from torch import nn

from harness.parallel.parallelize import ColumnParallelLinear
from models.layers import QKVProjection
from models.plan import ParallelPlan

FUSABLE = (nn.Linear, ColumnParallelLinear)
"""Classes of linears that can be joined."""


def fuse_projections(network: nn.Module, plan: ParallelPlan) -> int:
    """Join the three linears of every self-attention, in place, as they are on this rank.

    Args:
        network: the network, after its linears were sharded and its LoRA updates merged.
        plan: the network's plan; cross-attention to a text, which it calls local, keeps its linears.

    Returns:
        How many attentions were changed.
    """
    count = 0
    for name, module in network.named_modules():
        if isinstance(module, QKVProjection) and not any(fnmatch(name, pattern) for pattern in plan.local_attention):
            linears = [module.to_q, module.to_k, module.to_v]
            if all(isinstance(linear, FUSABLE) for linear in linears):
                module.to_qkv = concatenate_linears(linears)
                del module.to_q, module.to_k, module.to_v
                count += 1
    return count


def concatenate_linears(linears: Sequence[nn.Module]) -> nn.Linear:
    """Return one linear whose outputs are those of the given ones, in order."""
    weight = torch.cat([linear.get_parameter("weight") for linear in linears])
    one = nn.Linear(weight.shape[1], weight.shape[0], bias=linears[0].bias is not None, device="meta")
    one.weight = nn.Parameter(weight, requires_grad=False)
    if linears[0].bias is not None:
        one.bias = nn.Parameter(torch.cat([linear.get_parameter("bias") for linear in linears]), requires_grad=False)
    return one
