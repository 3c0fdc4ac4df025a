"""Floating-point operations: those of a forward, counted operator by operator, and the rate that the machine can reach.

A multiplication and an addition are two operations. Only matrix products, convolutions and attention count, as in
torch.utils.flop_counter. Everything that a rank computes counts, padding and repeated work included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

LARGEST_SIDE = {"cpu": 2048, "cuda": 8192}  # largest side of the square matrices whose product gives the ceiling
SMALLEST_SIDE = 256
PRODUCT_S = 0.05  # a product that takes longer is large enough
MEASURE_S = 0.4


class NoModuleTracker:
    """A replacement for torch's ModuleTracker, whose module names are not used here.

    It walks the tree of modules and never ends in a tree with a cycle, such as cache-dit's.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


@contextmanager
def count_operations(add: Callable[[int], None]) -> Iterator[None]:
    """Count what is computed inside the context; this is slower, so nothing is timed at the same time.

    Functions given to torch.compile run uncompiled. Otherwise it would skip a function that is first called here, now
    and for good.

    Args:
        add: Function that takes the number of operations at the end.

    Yields:
        None, while operations are counted.
    """
    mapping: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.mkldnn._linear_pointwise: _linear,
        torch.ops.aten._int_mm: _product,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    counter.mod_tracker = NoModuleTracker()  # type: ignore[assignment]
    with torch.compiler.set_stance("force_eager"), counter:
        yield
    add(counter.get_total_flops())


def _product(a_MK: Any, b_KN: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """Return the operations of a b in integers, from the shapes."""
    (rows, inner), columns = a_MK, b_KN[1]
    found: int = 2 * rows * inner * columns
    return found


def _attention(q_BHLD: Any, k_BHSD: Any, v_BHSE: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """Return the operations of q k^T and its product with v, from the shapes."""
    batch, heads, queries, width = q_BHLD
    keys, out_width = k_BHSD[2], v_BHSE[3]
    found: int = 2 * batch * heads * queries * keys * (width + out_width)
    return found


def _linear(x_BLC: Any, weight_NC: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """Return the operations of a linear layer on the last dimension, from the shapes."""
    found: int = 2 * math.prod(x_BLC) * weight_NC[0]
    return found


def ceiling_tflops(device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None]) -> float:
    """Return the best rate of a square matrix product on this rank with its threads, TFLOP/s.

    Every rank measures at the same time, as they compute at the same time. Matrices grow until a product takes long
    enough: a dtype that a processor has no instructions for would take minutes at the largest size.

    Args:
        device: The rank's device.
        dtype: The dtype of the product.
        synchronize: Function that waits until the device has done all its work.

    Returns:
        The rate, TFLOP/s.
    """
    largest = LARGEST_SIDE.get(device.type, LARGEST_SIDE["cuda"])
    side = min(SMALLEST_SIDE, largest)
    product_s = make_timed_product(side, device, dtype, synchronize)
    while (best := product_s()) < PRODUCT_S and side < largest:
        side *= 2
        product_s = make_timed_product(side, device, dtype, synchronize)
    until = time.perf_counter() + MEASURE_S
    while time.perf_counter() < until:
        best = min(best, product_s())
    return 2 * side**3 / best / 1e12


def make_timed_product(
    side: int, device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None]
) -> Callable[[], float]:
    """Return a function that computes one product of square matrices and returns its time in s.

    The first product is computed here and not timed.

    Args:
        side: Side of the matrices.
        device: The rank's device.
        dtype: The dtype of the product.
        synchronize: Function that waits until the device has done all its work.

    Returns:
        The function.
    """
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.mm(a, b)

    def product_s() -> float:
        synchronize()
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize()
        return time.perf_counter() - began

    return product_s
