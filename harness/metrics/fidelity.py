"""The error of a run against a reference, the bounds that it is held to, and what both together mean.

The reference is the same request by the native engine, on one rank in float32 with `math` attention, batch 1 and no
approximation. A run is held to it several times, since one error cannot show everything: rounding to bfloat16 hides a
wrong scale of 1 %. So its method is held in float32, its dtype by the floor, its repeats to one another, and the
reference to another implementation.

The floor is the error of the reference when it is computed in the run's dtype with another order of additions (oneDNN's
products instead of MKL's strict ones). No implementation of the same arithmetic can avoid that error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from harness.metrics.difference import Difference

HUGE = 1e300  # stands for NaN and infinity, which JSON does not have
MOST = 0.5  # largest bound: an error of half the image is never rounding
MARGIN = 3.0  # factor of the floor, which is one sample of a random error
ROUNDING = 1e-5  # relative L2 that always counts as rounding: the tolerance of the tests of layouts and kernels
EXACT, EQUIVALENT, APPROXIMATE = "exact", "fp_equivalent", "approximate"
IDENTICAL, WITHIN_FLOOR, BROKEN = "identical", "within_floor", "broken"


class Check(msgspec.Struct, frozen=True):
    """One comparison that a run, or what it shares with its reference, is held to.

    Attributes:
        name: What is held: method, dtype, repeats, operators, shared arithmetic or noise scheduler.
        error: Relative L2 error, the larger of latent and pixel.
        bound: Largest error that passes, so every larger one would have been seen.
        against: What it is compared with.
    """

    name: str
    error: float
    bound: float
    against: str

    @property
    def passed(self) -> bool:
        """Whether the error is within its bound; NaN is not."""
        return self.error <= self.bound


class Fidelity(msgspec.Struct, frozen=True):
    """A run's error at the final latent and at the pixel, and what it means.

    Attributes:
        method_class: `exact` (bit for bit), `fp_equivalent` (the same up to rounding) or `approximate`: the weakest
            class of the methods that the run uses.
        methods: The methods that make it so.
        latent: Error of the final latent against the reference, of the repeat with the largest one.
        pixel: Error of the pixels against the reference, of the repeat with the largest one.
        floor_latent: Relative L2 of the floor at the final latent.
        floor_pixel: Relative L2 of the floor at the pixels.
        verdict: identical, within_floor, approximate or broken.
        reference: Key of the reference in the cache.
        steps_rel_l2: Relative L2 of the state after every solver step, if it was requested.
        checks: All comparisons that the run was held to.
        not_held: Checks that could not be made; notes say why.
        detectable: Smallest relative error of the method that would have been called broken; 0 if every bit counts.
            None if nothing holds the method.
        generated: References that were generated for this run; the others were kept from earlier ones.
        duration_s: Time that all of this took besides the run, s.
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
    checks: list[Check] = []
    not_held: list[str] = []
    detectable: float | None = None
    generated: list[str] = []
    duration_s: float | None = None

    @property
    def broken(self) -> list[Check]:
        """The checks that failed."""
        return [row for row in self.checks if not row.passed]


def rounding_bound(floor: float) -> float:
    """Return the relative L2 up to which an error counts as rounding."""
    return min(max(MARGIN * floor, ROUNDING), MOST)


def check(name: str, error: float, bound: float, against: str) -> Check:
    """Return a check whose error is finite; NaN is the largest error."""
    return Check(name, error if error <= HUGE else HUGE, bound, against)


def verdict(
    method_class: str,
    latent: Difference,
    pixel: Difference,
    floor_latent: float,
    floor_pixel: float,
    checks: Sequence[Check] = (),
) -> str:
    """Return what the errors mean for a method of this class; a method that misses its claim is broken."""
    finite = math.isfinite(latent.rel_l2) and math.isfinite(pixel.rel_l2)
    if not finite or not all(row.passed for row in checks):
        return BROKEN
    if latent.identical and pixel.identical:
        return IDENTICAL
    within = latent.rel_l2 <= rounding_bound(floor_latent) and pixel.rel_l2 <= rounding_bound(floor_pixel)  # NaN is not
    if method_class == EXACT:
        return BROKEN
    if within:
        return WITHIN_FLOOR
    return APPROXIMATE if method_class == APPROXIMATE else BROKEN
