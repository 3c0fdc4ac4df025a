"""Floating-point operations: those that a forward does, counted operator by operator, and how many the machine can do.

A multiplication and an addition are two operations; only matrix products, convolutions and attention count, as in
torch.utils.flop_counter. What a rank does is counted, padding and repeated work included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

SIDES = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is the ceiling, at most
SMALLEST = 256
PRODUCT_S = 0.05  # a product that takes longer is large enough
MEASURE_S = 0.4


class Unnamed:
    """In the place of torch's ModuleTracker, whose names of modules nothing here reads: it walks their tree, and does
    not come back from one with a loop, as cache-dit makes it.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


@contextmanager
def count_operations(add: Callable[[int], None]) -> Iterator[None]:
    """Counts what is computed while it lasts; slower than without, so nothing is timed meanwhile.

    What torch.compile was asked to compile runs as it is written: it would skip a function that is first called here,
    now and for good.
    """
    mapping: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.mkldnn._linear_pointwise: _linear,
        torch.ops.aten._int_mm: _product,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    counter.mod_tracker = Unnamed()  # type: ignore[assignment]
    with torch.compiler.set_stance("force_eager"), counter:
        yield
    add(counter.get_total_flops())


def _product(a_MK: Any, b_KN: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """Of shapes: a b, in integers."""
    (rows, inner), columns = a_MK, b_KN[1]
    found: int = 2 * rows * inner * columns
    return found


def _attention(q_BHLD: Any, k_BHSD: Any, v_BHSE: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """Of shapes: q k^T and its product with v."""
    batch, heads, queries, width = q_BHLD
    keys, out_width = k_BHSD[2], v_BHSE[3]
    found: int = 2 * batch * heads * queries * keys * (width + out_width)
    return found


def _linear(x_BLC: Any, weight_NC: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """Of shapes: a linear of the last dimension."""
    found: int = 2 * math.prod(x_BLC) * weight_NC[0]
    return found


def ceiling_tflops(device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None]) -> float:
    """The best rate of a square matrix product on this rank, with the threads that it has, TFLOP/s.

    Every rank measures at once, as they compute at once. Matrices grow until a product takes long enough: a dtype that
    a processor has no instructions for would take minutes at the largest.
    """
    largest = SIDES.get(device.type, SIDES["cuda"])
    side = min(SMALLEST, largest)
    product_s = timed_product(side, device, dtype, synchronize)
    while (best := product_s()) < PRODUCT_S and side < largest:
        side *= 2
        product_s = timed_product(side, device, dtype, synchronize)
    until = time.perf_counter() + MEASURE_S
    while time.perf_counter() < until:
        best = min(best, product_s())
    return 2 * side**3 / best / 1e12


def timed_product(
    side: int, device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None]
) -> Callable[[], float]:
    """Computes one product of square matrices again, and says how many seconds it took; the first is not timed."""
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.mm(a, b)

    def product_s() -> float:
        synchronize()
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize()
        return time.perf_counter() - began

    return product_s
