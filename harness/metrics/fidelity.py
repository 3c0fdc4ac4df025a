"""The error of a method against a reference, beside the error that rounding alone makes.

The reference is the same request by the native engine, on one rank in float32 with `math` attention, batch 1 and no
approximation. The floor is the error of that reference when it is computed in the run's dtype with another order of
additions (oneDNN's products instead of MKL's strict ones). No implementation of the same arithmetic can avoid that
error.
"""

from __future__ import annotations

import msgspec

from harness.metrics.difference import Difference

MARGIN = 3.0  # factor of the floor, which is one sample of a random error
ROUNDING = 1e-5  # relative L2 that always counts as rounding: the tolerance of the tests of layouts and kernels
EXACT, EQUIVALENT, APPROXIMATE = "exact", "fp_equivalent", "approximate"
IDENTICAL, WITHIN_FLOOR, BROKEN = "identical", "within_floor", "broken"


class Fidelity(msgspec.Struct, frozen=True):
    """A run's error at the final latent and at the pixel, and what it means.

    Attributes:
        method_class: `exact` (bit for bit), `fp_equivalent` (the same up to rounding) or `approximate`: the weakest
            class of the methods that the run uses.
        methods: The methods that make it so.
        latent: Error of the final latent against the reference.
        pixel: Error of the pixels against the reference.
        floor_latent: Relative L2 of the floor at the final latent.
        floor_pixel: Relative L2 of the floor at the pixels.
        verdict: identical, within_floor, approximate or broken.
        reference: Key of the reference in the cache.
        steps_rel_l2: Relative L2 of the state after every solver step, if it was requested.
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
    """Return the relative L2 up to which an error counts as rounding."""
    return max(MARGIN * floor, ROUNDING)


def verdict(method_class: str, latent: Difference, pixel: Difference, floor_latent: float, floor_pixel: float) -> str:
    """Return what the errors mean for a method of this class; a method that misses its claim is broken."""
    if latent.identical and pixel.identical:
        return IDENTICAL
    within = latent.rel_l2 <= rounding_bound(floor_latent) and pixel.rel_l2 <= rounding_bound(floor_pixel)  # NaN is not
    if method_class == EXACT:
        return BROKEN
    if within:
        return WITHIN_FLOOR
    return APPROXIMATE if method_class == APPROXIMATE else BROKEN
