"""Products of bfloat16 numbers in float32, on a CPU without instructions for bfloat16.

The product of two bfloat16 numbers is a float32, and sums of products are rounded once on every processor. So the
outputs are those of other processors. Activations and weights stay bfloat16, and are upcast when they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.parallel.parallelize import ColumnParallelLinear, RowParallelLinear

FEW_ROWS = 8
"""With fewer rows a product takes no longer than upcasting its weights."""


def should_upcast(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products are faster in float32.

    They are for bfloat16, if oneDNN has no such products here and PyTorch uses its own loops.

    Args:
        device: the device that computes.
        dtype: the dtype of the products.

    Returns:
        Whether to upcast.
    """
    return device.type == "cpu" and dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def upcast(network: nn.Module) -> int:
    """Make the bfloat16 linears and convolutions of a network compute their products in float32, in place.

    Args:
        network: the network, whole or sharded over ranks; its quantized weights stay as they are.

    Returns:
        How many modules were changed.
    """
    count = 0
    for module in network.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dtype is torch.bfloat16 and type(weight.data) is Tensor:
            kind = type(module)
            module.__class__ = _upcast_class(kind)  # type: ignore[arg-type]  # classes are hashable
            count += type(module) is not kind
    return count


def upcast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute F.linear in float32, rounded to the dtype of x."""
    if x.numel() < FEW_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    return _upcast_product(F.linear, x, weight, bias)


def _upcast_product(partial_product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return partial_product(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


class UpcastLinear(nn.Linear):
    """A linear with products in float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute the outputs."""
        return upcast_linear(input, self.weight, self.bias)


class UpcastColumnParallelLinear(ColumnParallelLinear):
    """A column-parallel linear with products in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute this rank's output features."""
        return upcast_linear(x, self.weight, self.bias)


class UpcastRowParallelLinear(RowParallelLinear):
    """A row-parallel linear with products in float32."""

    def partial_product(self, x: Tensor) -> Tensor:
        """Return this rank's term of the sum."""
        return upcast_linear(x, self.weight)


class UpcastConv1d(nn.Conv1d):
    """A 1D convolution with products in float32."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _upcast_product(super()._conv_forward, input, weight, bias)


class UpcastConv2d(nn.Conv2d):
    """A 2D convolution with products in float32."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _upcast_product(super()._conv_forward, input, weight, bias)


class UpcastConv3d(nn.Conv3d):
    """A 3D convolution with products in float32."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _upcast_product(super()._conv_forward, input, weight, bias)


UPCAST_CLASSES: tuple[type[nn.Module], ...] = (
    UpcastLinear,
    UpcastColumnParallelLinear,
    UpcastRowParallelLinear,
    UpcastConv1d,
    UpcastConv2d,
    UpcastConv3d,
)


@cache
def _upcast_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of the same modules with products in float32; subclasses keep their own methods.

    A class without such products is returned unchanged.

    Args:
        kind: the class of a module.

    Returns:
        The class to use.
    """
    for upcast_class in UPCAST_CLASSES:
        plain = upcast_class.__mro__[1]
        if kind is plain:
            return upcast_class
        if issubclass(kind, plain) and not issubclass(kind, upcast_class):
            return type(f"Wide{kind.__name__}", (kind, upcast_class), {})
    return kind
