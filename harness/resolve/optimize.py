"""Whether a configuration's network can be optimised, and how it is; decided before a process starts, without torch."""

from __future__ import annotations

import warnings

from harness.config.optimize import CompileConfig, EagerConfig, Optimize
from harness.config.schema import Quantize, RunConfig, Task
from harness.resolve.engines_table import CACHE_DIT, NATIVE, SGLANG


def resolve_optimize(config: RunConfig) -> None:
    """Puts what is done in the place of engine.optimize=auto, and refuses what cannot be done.

    auto is the fastest way that was measured: eager wherever it works, for requests of any length, since compile saved
    no more and has its first call to win back.

    Raises:
        ValueError: what to change, in one line.
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
            "engine.compile.cuda_graphs=true is of engine=diffusers; the native network is in CUDA graphs with "
            "engine.eager.cuda_graphs=true, the default; drop it"
        )
    if engine.optimize is not Optimize.none and engine.name != NATIVE and engine.eager != EagerConfig():
        warnings.warn(f"engine.eager has no effect with engine={engine.name}", stacklevel=2)


def _refusal(config: RunConfig) -> str | None:
    """Why what engine.optimize names cannot be done, and what to change."""
    engine = config.engine
    if engine.optimize is Optimize.none:
        return None
    if config.task.name is Task.train:
        return "has no effect on task=train; drop it"
    if engine.name == NATIVE and config.parallel.shard_weights:
        return (
            "uses a block's weights apart from the block, and parallel.shard_weights=true deals them; use "
            "engine.optimize=none, or drop parallel.shard_weights"
        )
    if config.parallel.pipe > 1:
        return (
            f"computes for all blocks at once, and parallel.pipe={config.parallel.pipe} deals them; use "
            "engine.optimize=none, or drop parallel.pipe"
        )
    if engine.name in (CACHE_DIT, SGLANG) or (engine.name != NATIVE and engine.optimize is Optimize.eager):
        return f"does not go with engine={engine.name}; use engine=native, or engine.optimize=none"
    return None
