"""Products of bfloat16 numbers, on a CPU without instructions for them, by those for float32.

The product of two such numbers is a float32, and sums of products are rounded once wherever they are computed, so the
outputs are those of other processors; activations and weights stay bfloat16, and are widened as they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.parallel.parallelize import ColumnParallelLinear, RowParallelLinear

FEW_ROWS = 8  # rows, of which a product takes no longer than widening its weights


def should_upcast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products are the faster ones in float32: of bfloat16 where oneDNN has none, and PyTorch its own loops."""
    return device.type == "cpu" and dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def upcast(network: nn.Module) -> int:
    """Makes the linears and convolutions of a network that have bfloat16 weights widen what they multiply, in place.

    Args:
        network: whole or cut over ranks; quantised weights in it stay as they are.

    Returns:
        How many there were.
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
    """As F.linear, in float32, rounded to the dtype of x."""
    if x.numel() < FEW_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    return _upcast_product(F.linear, x, weight, bias)


def _upcast_product(partial_product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return partial_product(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


class UpcastLinear(nn.Linear):
    """A linear that widens what it multiplies."""

    def forward(self, input: Tensor) -> Tensor:
        return upcast_linear(input, self.weight, self.bias)


class UpcastColumnParallelLinear(ColumnParallelLinear):
    """The same of a rank's output features."""

    def forward(self, x: Tensor) -> Tensor:
        return upcast_linear(x, self.weight, self.bias)


class UpcastRowParallelLinear(RowParallelLinear):
    """The same of a rank's input features."""

    def partial_product(self, x: Tensor) -> Tensor:
        return upcast_linear(x, self.weight)


class UpcastConv1d(nn.Conv1d):
    """A convolution that widens what it multiplies."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _upcast_product(super()._conv_forward, input, weight, bias)


class UpcastConv2d(nn.Conv2d):
    """The same of pictures."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _upcast_product(super()._conv_forward, input, weight, bias)


class UpcastConv3d(nn.Conv3d):
    """The same of videos."""

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
    """The class of the same modules that multiplies in float32, a kind's own method around it; else the kind itself."""
    for upcast_class in UPCAST_CLASSES:
        plain = upcast_class.__mro__[1]
        if kind is plain:
            return upcast_class
        if issubclass(kind, plain) and not issubclass(kind, upcast_class):
            return type(f"Wide{kind.__name__}", (kind, upcast_class), {})
    return kind
