"""Building networks without filling them, and filling them with random numbers at the speed of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.parts import Part

TILE = 1_000_003  # prime, so that no two rows of a matrix repeat one another
STRIDE = 7_919
N = TypeVar("N", bound=nn.Module)
FILLS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)


class _WithoutFilling(TorchDispatchMode):
    """Leaves memory as it was allocated where an initialiser would draw random numbers into it."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0] if func in FILLS else func(*args, **(kwargs or {}))


def build_empty(make: Callable[[], N], dtype: torch.dtype, device: torch.device | str = "cpu") -> N:
    """A module in its dtype, on its device, with buffers computed and parameters left as allocated.

    Nothing is resident until it is written: a network of W bytes costs W bytes to load, not 2 W.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), _WithoutFilling():
            return make()
    finally:
        torch.set_default_dtype(before)


def allocate(module: nn.Module, device: torch.device | str) -> None:
    """Gives every parameter new memory on a device (none on `meta`), left as it was allocated; buffers stay."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False))


def fill_dummy(
    module: nn.Module,
    seed: int = 0,
    places: Mapping[str, int] | None = None,
    parts: Mapping[str, Part] | None = None,
) -> None:
    """Random weights of sane scale, in place: matrices and kernels of variance 1 / fan-in, gains 1, biases 0.

    A tile of normal numbers is laid end to end over every tensor, from another place in each, which is as fast as
    copying memory. `places` numbers the parameters by name, where it is not their order in the module that decides:
    two modules of one network under other names and in another order then have the same numbers. `parts` says by name
    which part of a whole parameter one is: it has the numbers that the whole one would have there.
    """
    tile = torch.randn(TILE, generator=torch.Generator("cpu").manual_seed(seed))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(module.named_parameters()):
            if parameter.is_meta:
                continue
            place = number if places is None else places[name]
            if parameter.ndim > 1:
                part = (parts or {}).get(name)
                whole = parameter if part is None else parameter.new_empty(part.whole(parameter.shape))
                shifted = tile.roll(place * STRIDE) / whole[0].numel() ** 0.5
                _lay(whole, shifted.to(device=whole.device, dtype=whole.dtype))
                if part is not None:
                    parameter.copy_(part.of(whole))
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)


def _lay(parameter: Tensor, tile: Tensor) -> None:
    flat = parameter.view(-1)
    for start in range(0, len(flat), TILE):
        part = flat[start : start + TILE]
        part.copy_(tile[: len(part)])
