"""Group `cache`: which evaluations of the denoiser, or which of their branches, are skipped.

Everything here works without torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Unpack

from harness.config.bounds import MAX_STEPS
from schedulers.options import option
from schedulers.registry import Common, Names, Registry, Target

NONE = "none"
IDENTITY = (1.0, 0.0)  # the polynomial that leaves a change as it is measured
BLOCK_KEYS = ("order", "warmup", "final")


@dataclass(frozen=True)
class CacheEntry:
    """One cache policy.

    Attributes:
        make: Function of the `cache` group to a SkipPolicy (harness.caching.blocks) or, for a cache of guidance
            branches, a GuidanceSchedule (harness.pipeline.guidance).
        keys: Keys of the group that it uses.
        guidance: Whether branches of guidance are skipped, and not blocks.
    """

    make: Target
    keys: tuple[str, ...]
    guidance: bool = False


CACHES: Registry[CacheEntry] = Registry("cache policy", "cache.name", "cache")
"""Cache policies by name, besides `none`."""


def register_cache_policy(
    name: str,
    make: Target,
    *,
    keys: tuple[str, ...] = (),
    guidance: bool = False,
    **common: Unpack[Common],
) -> None:
    """Register a cache policy, for cache.name.

    Args:
        name: The policy's name.
        make: Function of the `cache` group to a SkipPolicy (harness.caching.blocks) or, for a cache of guidance
            branches, a GuidanceSchedule (harness.pipeline.guidance).
        keys: Keys of the `cache` group that it uses, besides order, warmup and final of every cache of blocks.
        guidance: Whether branches of guidance are skipped, and not blocks.
        **common: Options of its own, its layouts, and whether requests may share its forwards.
    """
    entry = CacheEntry(make, keys if guidance else (*keys, *BLOCK_KEYS), guidance)
    CACHES.register(name, entry, **common)


def is_block_cache(name: str) -> bool:
    """Return whether a cache skips blocks."""
    return name in CACHES and not CACHES[name].guidance


def is_guidance_cache(name: str) -> bool:
    """Return whether a cache skips guidance branches."""
    return name in CACHES and CACHES[name].guidance


def cache_keys(name: str) -> tuple[str, ...]:
    """Return the keys of the `cache` group that a cache uses; none for `none`, or for one that is not registered."""
    return CACHES[name].keys if name in CACHES else ()


HOME = "harness.caching.policies"
register_cache_policy("teacache", f"{HOME}:teacache", keys=("threshold", "coefficients"))
register_cache_policy("first_block", f"{HOME}:first_block", keys=("threshold",))
register_cache_policy("taylorseer", f"{HOME}:taylorseer", keys=("interval",))
register_cache_policy("guidance_interval", f"{HOME}:guidance_interval", keys=("sigma_low", "sigma_high"), guidance=True)
register_cache_policy("guidance_skip", f"{HOME}:guidance_skip", keys=("interval", "warmup"), guidance=True)


@dataclass
class CacheConfig:
    """Group `cache`. null is the published value of the model if there is one, else the default given here."""

    name: str = option(NONE, "Name of the cache.", words=Names(NONE, CACHES))
    threshold: float | None = option(None, "Change below which an evaluation is skipped. null = 0.1.", low=0)
    coefficients: list[float] | None = option(
        None, "Polynomial of the change, highest power first. null = the model's published one, or identity."
    )
    interval: int | None = option(None, "Compute one of this many evaluations. null = 3.", low=1, high=MAX_STEPS)
    order: int | None = option(
        None, "Order of the Taylor series of the residual; 0 reuses it. null = 1 for taylorseer, else 0.", low=0, high=8
    )
    warmup: int | None = option(
        None, "Evaluations before the first skipped one. null = 3 for taylorseer, else 1.", low=1, high=MAX_STEPS
    )
    final: bool | None = option(None, "Whether the last solver step is always computed. null = true for teacache.")
    sigma_low: float | None = option(None, "sigma / alpha above which guidance is on. null = 0.", low=0)
    sigma_high: float | None = option(None, "sigma / alpha up to which guidance is on. null = no bound.", low=0)


@dataclass(frozen=True)
class TeaCacheDefaults:
    """The settings with which TeaCache's authors run a model (github.com/ali-vilab/TeaCache, arXiv:2411.19108).

    Attributes:
        coefficients: Polynomial of the change, highest power first.
        warmup: Evaluations before the first skipped one.
        final: Whether the last solver step is always computed.
    """

    coefficients: tuple[float, ...]
    warmup: int = 1
    final: bool = True


FLUX = TeaCacheDefaults((4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01))
TEACACHE_DEFAULTS: Mapping[str, TeaCacheDefaults] = {
    "flux": FLUX,  # TeaCache4FLUX, which makes no difference between the two models
    "flux_schnell": FLUX,
    # TeaCache4Wan2.1 with use_ret_steps, whose signal is the modulation by the time embedding
    "wan_1_3b": TeaCacheDefaults(
        (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02), 5, False
    ),
    "wan_14b": TeaCacheDefaults(
        (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01), 5, False
    ),
}
"""TeaCache's settings by model; the polynomials were fitted to the published weights, resolution and guidance."""


def check_cache(cache: CacheConfig, model: str, guidance: float) -> None:
    """Fill the keys that are null and refuse numbers that cannot run.

    Args:
        cache: The `cache` group, changed in place.
        model: The model's name.
        guidance: The request's guidance scale.

    Raises:
        ValueError: A number is out of range; one line says what to change.
    """
    given = [f.name for f in fields(CacheConfig) if f.name != "name" and getattr(cache, f.name) is not None]
    for unused in (key for key in given if key not in cache_keys(cache.name)):
        warnings.warn(f"cache.{unused} has no effect with cache={cache.name}", stacklevel=2)
    if is_guidance_cache(cache.name) and guidance == 1:
        warnings.warn(f"cache={cache.name} has no effect with request.guidance=1, which has one branch", stacklevel=2)
    fill_defaults(cache, model)
    if cache.sigma_high is not None and cache.sigma_high <= (cache.sigma_low or 0.0):
        raise ValueError(
            f"cache.sigma_high={cache.sigma_high} is not above cache.sigma_low={cache.sigma_low}; nothing would be "
            "guided: use request.guidance=1 for that"
        )


def fill_defaults(cache: CacheConfig, model: str = "") -> None:
    """Fill, in place, the keys that a cache uses and that are null."""
    tea, taylor = cache.name == "teacache", cache.name == "taylorseer"
    known = TEACACHE_DEFAULTS.get(model, TeaCacheDefaults(IDENTITY))
    defaults: dict[str, object] = {
        "threshold": 0.1,
        "coefficients": list(known.coefficients),
        "interval": 3,
        "order": int(taylor),
        "warmup": known.warmup if tea else 3 if taylor else 1,
        "final": tea and known.final,
        "sigma_low": 0.0,
    }
    for key in cache_keys(cache.name):
        if getattr(cache, key) is None:
            setattr(cache, key, defaults.get(key))
