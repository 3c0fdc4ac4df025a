"""Linears on the CPU with weights packed in oneDNN's order, and the GELU after them in the same kernel.

It does to modules what inductor's freezing does to a graph (torch/_inductor/fx_passes/mkldnn_fusion.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.optimize.precompute import OutputSlice, Passthrough
from harness.parallel.parallelize import ColumnParallelLinear
from models.layers import Modulation


class PackedLinear(nn.Module):
    """A linear with or without a GELU (tanh form) of its outputs; the packed weight is no parameter any more.

    Args:
        linear: the linear to pack.
        gelu: whether to apply the GELU.
    """

    def __init__(self, linear: nn.Linear | ColumnParallelLinear, gelu: bool = False) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias
        self.activation: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *self.activation)
        return output


def prepack(module: nn.Module) -> None:
    """Pack the linears in a module, in place, with the GELU after them.

    Linears that modulate, that are precomputed, or whose outputs are summed over ranks stay as they are.

    Args:
        module: the module, changed in place.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear | ColumnParallelLinear) and not isinstance(child, Modulation):
            gelu = name == "up" and isinstance(module._modules.get("activation"), nn.GELU)
            setattr(module, name, PackedLinear(child, gelu))
            if gelu:
                module.activation = nn.Identity()
        elif not isinstance(child, OutputSlice | Passthrough):
            prepack(child)
