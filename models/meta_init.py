"""Building of networks without initializing them, and filling them with random numbers at memory speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.tensor_slice import TensorSlice

TILE = 1_000_003  # prime, so that no two rows of a matrix repeat one another
STRIDE = 7_919
N = TypeVar("N", bound=nn.Module)
RANDOM_INITIALIZERS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)


class _SkipInit(TorchDispatchMode):
    """A dispatch mode that leaves memory as allocated when an initializer would write random numbers to it."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0] if func in RANDOM_INITIALIZERS else func(*args, **(kwargs or {}))


def build_empty(make: Callable[[], N], dtype: torch.dtype, device: torch.device | str = "cpu") -> N:
    """Build a module in its dtype, on its device, with buffers computed and parameters left uninitialized.

    No page of a parameter is resident until it is written: a network of W bytes costs W bytes to load, not 2 W.

    Args:
        make: The function that builds the module.
        dtype: The dtype of its parameters.
        device: The device of its parameters and buffers.

    Returns:
        The module.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), _SkipInit():
            return make()
    finally:
        torch.set_default_dtype(default)


def allocate(module: nn.Module, device: torch.device | str) -> None:
    """Give every parameter new uninitialized memory on a device (none on `meta`); buffers stay."""
    for parent in module.modules():
        for name, parameter in list(parent.named_parameters(recurse=False)):
            setattr(parent, name, nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False))


def fill_dummy(
    module: nn.Module,
    seed: int = 0,
    order: Mapping[str, int] | None = None,
    slices: Mapping[str, TensorSlice] | None = None,
) -> None:
    """Fill the parameters with random values: matrices and kernels of variance 1 / fan-in, gains 1, biases 0.

    A tile of normal numbers is repeated over each tensor, from another offset in each, which is as fast as copying
    memory.

    Args:
        module: The module to fill, in place.
        seed: The seed of the tile.
        order: The number of each parameter, by name, in place of its position in the module. Two modules of one network
            with other names and another order then have the same values.
        slices: The slice of a full parameter that a sharded one holds, by name; it gets the values that the full one
            has there.
    """
    tile = torch.randn(TILE, generator=torch.Generator("cpu").manual_seed(seed))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(module.named_parameters()):
            if parameter.is_meta:
                continue
            position = number if order is None else order[name]
            if parameter.ndim > 1:
                tensor_slice = (slices or {}).get(name)
                full = (
                    parameter if tensor_slice is None else parameter.new_empty(tensor_slice.full_shape(parameter.shape))
                )
                shifted = tile.roll(position * STRIDE) / full[0].numel() ** 0.5
                _repeat_into(full, shifted.to(device=full.device, dtype=full.dtype))
                if tensor_slice is not None:
                    parameter.copy_(tensor_slice.of(full))
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)


def _repeat_into(parameter: Tensor, tile: Tensor) -> None:
    flat = parameter.view(-1)
    for start in range(0, len(flat), TILE):
        part = flat[start : start + TILE]
        part.copy_(tile[: len(part)])
