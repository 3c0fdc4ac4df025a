"""Group `cache`: which evaluations of the denoiser, or which of their branches, are not computed.

Read and checked without torch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields

NONE = "none"
IDENTITY = (1.0, 0.0)  # the change as it is measured


@dataclass
class CacheConfig:
    """Group `cache`. null is the published value of the model where there is one, else the default beside it."""

    name: str = NONE  # none, teacache, first_block, taylorseer, guidance_interval, guidance_skip
    threshold: float | None = None  # of teacache and first_block: the change below which nothing is computed; 0.1
    coefficients: list[float] | None = None  # of teacache: a polynomial over the change, highest power first; identity
    interval: int | None = None  # of taylorseer: one evaluation of so many is computed; of guidance_skip likewise; 3
    order: int | None = None  # of the Taylor series of what the blocks add; 0 adds what they added; taylorseer's is 1
    warmup: int | None = None  # evaluations before the first that is not computed; 1, taylorseer's 3
    final: bool | None = None  # the last solver step is always computed; true with teacache
    sigma_low: float | None = None  # of guidance_interval, of sigma / alpha: guided above it; 0
    sigma_high: float | None = None  # guided up to it; null = no bound


@dataclass(frozen=True)
class Published:
    """What TeaCache's authors run a model with (github.com/ali-vilab/TeaCache, arXiv:2411.19108)."""

    coefficients: tuple[float, ...]
    warmup: int = 1
    final: bool = True


FLUX = Published((4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01))
PUBLISHED: Mapping[str, Published] = {
    "flux": FLUX,  # TeaCache4FLUX, which does not tell the two apart
    "flux_schnell": FLUX,
    # TeaCache4Wan2.1 with use_ret_steps, whose signal is the time's modulation
    "wan_1_3b": Published((-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02), 5, False),
    "wan_14b": Published((-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01), 5, False),
}
"""By model: the polynomials were fitted to the published weights at their resolution and guidance."""

BLOCKS = ("order", "warmup", "final")
READ: Mapping[str, tuple[str, ...]] = {
    NONE: (),
    "teacache": ("threshold", "coefficients", *BLOCKS),
    "first_block": ("threshold", *BLOCKS),
    "taylorseer": ("interval", *BLOCKS),
    "guidance_interval": ("sigma_low", "sigma_high"),
    "guidance_skip": ("interval", "warmup"),
}
"""The keys that each cache reads."""

OF_BLOCKS = tuple(name for name, keys in READ.items() if "order" in keys)
OF_GUIDANCE = tuple(name for name, keys in READ.items() if keys and name not in OF_BLOCKS)


def check_cache(cache: CacheConfig, model: str, has_blocks: bool, guidance: float) -> None:
    """Fills what is null, and refuses what cannot be.

    Args:
        cache: in place.
        model: its name.
        has_blocks: the network is a transformer, of equal blocks.
        guidance: of the request.

    Raises:
        ValueError: what to change, in one line.
    """
    if cache.name not in READ:
        raise ValueError(f"cache.name={cache.name} is unknown; use one of {', '.join(READ)}")
    asked = [f.name for f in fields(CacheConfig) if f.name != "name" and getattr(cache, f.name) is not None]
    for unread in (key for key in asked if key not in READ[cache.name]):
        warnings.warn(f"cache.{unread} has no effect with cache={cache.name}", stacklevel=2)
    if cache.name in OF_BLOCKS and not has_blocks:
        raise ValueError(
            f"cache={cache.name} passes equal blocks by, and model={model} has a U-Net; use cache=guidance_interval, "
            "guidance_skip or none"
        )
    if cache.name in OF_GUIDANCE and guidance == 1:
        warnings.warn(f"cache={cache.name} has no effect with request.guidance=1, which has one branch", stacklevel=2)
    fill(cache, model)
    _check_numbers(cache)


def fill(cache: CacheConfig, model: str = "") -> None:
    """Fills the keys that a cache reads and that are null, in place."""
    tea, taylor = cache.name == "teacache", cache.name == "taylorseer"
    known = PUBLISHED.get(model, Published(IDENTITY))
    defaults: dict[str, object] = {
        "threshold": 0.1,
        "coefficients": list(known.coefficients),
        "interval": 3,
        "order": int(taylor),
        "warmup": known.warmup if tea else 3 if taylor else 1,
        "final": tea and known.final,
        "sigma_low": 0.0,
    }
    for key in READ[cache.name]:
        if getattr(cache, key) is None:
            setattr(cache, key, defaults.get(key))


def _check_numbers(cache: CacheConfig) -> None:
    least = {"interval": 1, "order": 0, "warmup": 1, "threshold": 0.0, "sigma_low": 0.0, "sigma_high": 0.0}
    for key, bound in least.items():
        value = getattr(cache, key)
        if value is not None and not bound <= value < math.inf:
            raise ValueError(f"cache.{key}={value}; give at least {bound:g}")
    if cache.coefficients is not None and not all(map(math.isfinite, cache.coefficients)):
        raise ValueError(f"cache.coefficients={cache.coefficients}; give finite numbers, the highest power first")
    if cache.sigma_high is not None and cache.sigma_high <= (cache.sigma_low or 0.0):
        raise ValueError(
            f"cache.sigma_high={cache.sigma_high} is not above cache.sigma_low={cache.sigma_low}; nothing would be "
            "guided: use request.guidance=1 for that"
        )
