"""Whether and how a configuration's network can be optimised; decided before a process starts, without torch."""

from __future__ import annotations

import warnings

from harness.config.optimize import CompileConfig, EagerConfig, Optimize
from harness.config.schema import Quantize, RunConfig
from harness.config.tasks import TRAITS
from harness.resolve.engines_table import CACHE_DIT, NATIVE, SGLANG


def resolve_optimize(config: RunConfig) -> None:
    """Replace engine.optimize=auto by what is done, and refuse what cannot be done.

    auto is the fastest mode measured: eager wherever it works, for requests of any length. compile saved no more time
    and first has to make up for its slow first call.

    Args:
        config: The configuration, changed in place.

    Raises:
        ValueError: The mode cannot run; one line says what to change.
    """
    engine = config.engine
    if engine.optimize is Optimize.auto:
        engine.optimize = Optimize.eager
        if _refusal(config) is not None or config.model.quantize is not Quantize.none:
            engine.optimize = Optimize.none
    how = f"engine.optimize={engine.optimize.name}"
    if engine.optimize is Optimize.none and engine.eager != EagerConfig():
        warnings.warn(f"engine.eager has no effect with {how}", stacklevel=2)
    if engine.optimize is not Optimize.compile and engine.compile != CompileConfig():
        warnings.warn(f"engine.compile has no effect with {how}", stacklevel=2)
    if (refusal := _refusal(config)) is not None:
        raise ValueError(f"{how} {refusal}")
    if engine.name == NATIVE and engine.compile.cuda_graphs:
        raise ValueError(
            "engine.compile.cuda_graphs=true is for engine=diffusers; the native network uses CUDA graphs with "
            "engine.eager.cuda_graphs=true, the default; drop it"
        )
    if engine.optimize is not Optimize.none and engine.name != NATIVE and engine.eager != EagerConfig():
        warnings.warn(f"engine.eager has no effect with engine={engine.name}", stacklevel=2)


def _refusal(config: RunConfig) -> str | None:
    """Return why the mode in engine.optimize cannot run and what to change, or None if it can."""
    engine = config.engine
    if engine.optimize is Optimize.none:
        return None
    if not TRAITS[config.task.name].uses_checkpoint:
        return f"has no effect on task={config.task.name.name}; drop it"
    if engine.name == NATIVE and config.parallel.shard_weights:
        return (
            "uses a block's weights outside the block, and parallel.shard_weights=true shards them; use "
            "engine.optimize=none, or drop parallel.shard_weights"
        )
    if config.parallel.pipe > 1:
        return (
            f"computes for all blocks at once, and parallel.pipe={config.parallel.pipe} shards them; use "
            "engine.optimize=none, or drop parallel.pipe"
        )
    if engine.name in (CACHE_DIT, SGLANG) or (engine.name != NATIVE and engine.optimize is Optimize.eager):
        return f"does not go with engine={engine.name}; use engine=native, or engine.optimize=none"
    return None
