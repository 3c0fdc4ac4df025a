"""Linears of the CPU with weights in the order that oneDNN computes in, and the GELU behind them in the same kernel.

What inductor's freezing does to a graph (torch/_inductor/fx_passes/mkldnn_fusion.py), done to modules.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.parallel.parallelize import ColumnLinear


class PackedLinear(nn.Module):
    """A linear, with a GELU (tanh form) of its outputs or without; the packed weight is no parameter any more."""

    def __init__(self, linear: nn.Linear | ColumnLinear, gelu: bool = False) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias
        self.activation = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *self.activation)
        return made


def prepack(network: nn.Module) -> None:
    """Packs a network's linears in place, but those that modulate or are summed over ranks; a GELU behind one goes into
    its kernel.
    """
    for owner in list(network.modules()):
        for name, child in list(owner.named_children()):
            if type(child) in (nn.Linear, ColumnLinear):
                gelu = name == "up" and isinstance(owner._modules.get("activation"), nn.GELU)
                setattr(owner, name, PackedLinear(child, gelu))
                if gelu:
                    owner.activation = nn.Identity()
