"""What a method costs in the picture: its error against a reference, beside the error that rounding alone makes.

The reference is the same request by the native engine, on one rank in float32 with `math` attention, batch 1 and
nothing approximated. The floor is the error of that reference itself when it is computed in the row's dtype, with
another order of additions (oneDNN's products in place of MKL's strict ones): what no implementation of the same
arithmetic can be blamed for.
"""

from __future__ import annotations

import msgspec

from harness.metrics.difference import Difference

MARGIN = 3.0  # times the floor, which is one draw of a random error
ROUNDING = 1e-5  # relative L2 that is rounding in any case: the bound that layouts and kernels are tested to
EXACT, EQUIVALENT, APPROXIMATE = "exact", "fp_equivalent", "approximate"
IDENTICAL, WITHIN_FLOOR, BROKEN = "identical", "within_floor", "broken"


class Fidelity(msgspec.Struct, frozen=True):
    """A row's error at the final latent and at the pixel, and what it means.

    Args:
        method_class: `exact` (bit for bit), `fp_equivalent` (the same but for rounding) or `approximate`, the weakest
            of the methods that the row uses.
        methods: those that make it so.
        latent: against the reference.
        pixel: against the reference.
        floor_latent: relative L2 of the floor.
        floor_pixel: relative L2 of the floor.
        verdict: identical, within_floor, approximate or broken.
        reference: key of the reference in the cache.
        steps_rel_l2: of the state after every solver step, where it was asked for.
    """

    method_class: str
    methods: list[str]
    latent: Difference
    pixel: Difference
    floor_latent: float
    floor_pixel: float
    verdict: str
    reference: str
    steps_rel_l2: list[float] | None = None


def rounding_bound(floor: float) -> float:
    """The relative L2 up to which an error is rounding."""
    return max(MARGIN * floor, ROUNDING)


def verdict(method_class: str, latent: Difference, pixel: Difference, floor_latent: float, floor_pixel: float) -> str:
    """What the errors mean for a method of this class: one that claims more than it keeps is broken."""
    if latent.identical and pixel.identical:
        return IDENTICAL
    within = latent.rel_l2 <= rounding_bound(floor_latent) and pixel.rel_l2 <= rounding_bound(floor_pixel)  # NaN is not
    if method_class == EXACT:
        return BROKEN
    if within:
        return WITHIN_FLOOR
    return APPROXIMATE if method_class == APPROXIMATE else BROKEN
