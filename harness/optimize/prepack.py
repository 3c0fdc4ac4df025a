"""Linears of the CPU with weights in the order that oneDNN computes in, and the GELU behind them in the same kernel.

What inductor's freezing does to a graph (torch/_inductor/fx_passes/mkldnn_fusion.py), done to modules.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.optimize.precompute import OutputSlice, Passthrough
from harness.parallel.parallelize import ColumnParallelLinear
from models.layers import Modulation


class PackedLinear(nn.Module):
    """A linear, with a GELU (tanh form) of its outputs or without; the packed weight is no parameter any more."""

    def __init__(self, linear: nn.Linear | ColumnParallelLinear, gelu: bool = False) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias
        self.activation: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *self.activation)
        return output


def prepack(module: nn.Module) -> None:
    """Packs the linears in a module, in place, but those that modulate, are computed beforehand or summed over ranks; a
    GELU behind one goes into its kernel.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear | ColumnParallelLinear) and not isinstance(child, Modulation):
            gelu = name == "up" and isinstance(module._modules.get("activation"), nn.GELU)
            setattr(module, name, PackedLinear(child, gelu))
            if gelu:
                module.activation = nn.Identity()
        elif not isinstance(child, OutputSlice | Passthrough):
            prepack(child)
