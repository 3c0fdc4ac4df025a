"""The methods that a configuration may use and its reference does not, with the fidelity that each claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from harness.config.cache import NONE
from harness.config.engines import CACHE_DIT, ENGINES, NATIVE
from harness.config.optimize import Optimize
from harness.config.schema import DType, Quantize, RunConfig
from harness.config.tasks import TRAITS
from harness.metrics.fidelity import APPROXIMATE, EQUIVALENT, EXACT
from harness.parallel.mesh import degrees, world_size
from harness.resolve.checkpoint import COMPONENTS
from harness.tasks.common.references import set_float32, single_request
from models.registry import ATTENTION_BACKENDS

STRENGTH = (APPROXIMATE, EQUIVALENT, EXACT)
FLOAT32 = {DType.float32}
ALL_EXACT = 1_000_000  # evaluations before the first approximate one: more than a request has


def _use_math(config: RunConfig) -> None:
    config.attention.backend = "math"


def _skip_nothing(config: RunConfig) -> None:
    """Make the cache compute every evaluation, so that all of its code runs and nothing is approximate."""
    cache = config.cache
    cache.threshold = None if cache.threshold is None else 0.0
    cache.interval = None if cache.interval is None else 1
    cache.sigma_low = None if cache.sigma_low is None else 0.0
    cache.sigma_high = None


def _end_no_evaluation_early(config: RunConfig) -> None:
    config.engine.cache.warmup = ALL_EXACT


def _wait_for_every_rank(config: RunConfig) -> None:
    config.parallel.warmup = ALL_EXACT


def _use_full_weights(config: RunConfig) -> None:
    config.model.quantize = Quantize.none


def _is_approximate(backend: str) -> bool:
    """Return whether an attention backend rounds more than its tensors' dtype."""
    return backend in ATTENTION_BACKENDS and ATTENTION_BACKENDS[backend].approximate


class Method(NamedTuple):
    """A feature that a configuration may use and the reference does not.

    Attributes:
        name: Name of the feature in the record.
        method_class: Class that the feature claims: exact, fp_equivalent or approximate.
        used: Test of whether a configuration uses the feature.
        make_exact: Function that takes the approximation out of a configuration and leaves the rest of the feature in.
    """

    name: str
    method_class: str
    used: Callable[[RunConfig], bool]
    make_exact: Callable[[RunConfig], None] | None = None


DTYPE = Method("dtype", EQUIVALENT, lambda c: compute_dtypes(c) != FLOAT32, set_float32)
METHODS = (
    Method("approximate attention", APPROXIMATE, lambda c: _is_approximate(c.attention.backend), _use_math),
    Method("8-bit linears", APPROXIMATE, lambda c: c.model.quantize is not Quantize.none, _use_full_weights),
    Method(
        "attention kernel",
        EQUIVALENT,
        lambda c: c.attention.backend != "math" and not _is_approximate(c.attention.backend),
    ),
    Method("displaced patches", APPROXIMATE, lambda c: c.parallel.displaced, _wait_for_every_rank),
    Method("PipeFusion", APPROXIMATE, lambda c: c.parallel.pipe > 1, _wait_for_every_rank),
    Method("one image over several ranks", EQUIVALENT, lambda c: world_size(degrees(c.parallel)[1:]) > 1),
    Method("batching", EQUIVALENT, lambda c: c.request.batch_size > 1),
    DTYPE,
    Method("baseline engine", EQUIVALENT, lambda c: c.engine.name != NATIVE and not ENGINES[c.engine.name].approximate),
    Method("engine with images of its own", APPROXIMATE, lambda c: ENGINES[c.engine.name].approximate),
    Method(
        "baseline engine's own rounding of the state",
        APPROXIMATE,
        lambda c: c.engine.name != NATIVE and compute_dtypes(c) != FLOAT32,
        set_float32,
    ),
    Method("optimised network", EQUIVALENT, lambda c: c.engine.optimize is not Optimize.none),
    Method("cache-dit", APPROXIMATE, lambda c: c.engine.name == CACHE_DIT, _end_no_evaluation_early),
    Method("cache", APPROXIMATE, lambda c: c.cache.name != NONE, _skip_nothing),
    Method("fewer steps", APPROXIMATE, lambda c: c.task.reference_steps not in (None, c.request.steps)),
    Method("order of additions not fixed", EQUIVALENT, lambda c: not c.launch.reproducible),
)


def method_class(config: RunConfig, methods: Sequence[Method] = METHODS) -> tuple[str, list[str]]:
    """Return the weakest class among the methods that a configuration uses, and the names of those methods.

    Args:
        config: Configuration of the run.
        methods: All known methods.

    Returns:
        The class, and the names of the methods in use.
    """
    used = [method for method in methods if method.used(config)]
    return min([EXACT, *(method.method_class for method in used)], key=STRENGTH.index), [m.name for m in used]


def float32_method(config: RunConfig, device: str, methods: Sequence[Method] = METHODS) -> tuple[RunConfig, list[str]]:
    """Return the configuration in which a run's method is held: the run in float32, its approximations made exact.

    Args:
        config: Configuration of the run.
        device: The device that it ran on, such as cpu.
        methods: All known methods.

    Returns:
        The configuration; and notes about what does not run in float32, which the configuration leaves out.
    """
    found, notes = single_request(config), []
    if TRAITS[config.task.name].measures and found.model.text.cache_mib is None:
        found.model.text.cache_mib = 0.0  # a bench encodes its prompts at every request
    for method in methods:
        if method.make_exact is not None and method.used(config):
            method.make_exact(found)
    if found.attention.backend == "flash" and not device.startswith("cpu"):
        found.attention.backend = "math"
        notes.append("the flash kernel takes no float32 here, so only its operator is held, not the whole image")
    return found, notes


def compute_dtypes(config: RunConfig) -> set[DType]:
    """Return the dtypes that the components compute in."""
    model = config.model
    parts = [getattr(model, name).dtype for name in ("denoiser", *COMPONENTS)]
    return {model.dtype, *(part for part in parts if part is not None)}


def is_float32(config: RunConfig) -> bool:
    """Return whether every component computes in float32."""
    return compute_dtypes(config) == FLOAT32
