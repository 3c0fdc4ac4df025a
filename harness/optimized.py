"""Whether a configuration's network can be optimised, and how it is; decided before a process starts, without torch."""

from __future__ import annotations

import warnings

from harness.config.optimize import CompileConfig, EagerConfig, Optimize
from harness.config.schema import Quantize, RunConfig, Task
from harness.peer.table import CACHE_DIT, NATIVE, SGLANG


def resolve_optimize(config: RunConfig) -> None:
    """Puts what is done in the place of engine.optimize=auto, and refuses what cannot be done.

    auto is the fastest way that was measured: eager wherever it works, for requests of any length, since compile saved
    no more and has its first call to win back.

    Raises:
        ValueError: what to change, in one line.
    """
    engine = config.engine
    if engine.optimize is Optimize.auto:
        plain = config.task.name is Task.train or engine.name != NATIVE or config.model.quantize is not Quantize.none
        apart = config.parallel.shard_weights or config.parallel.pipe > 1
        engine.optimize = Optimize.none if plain or apart else Optimize.eager
    how = f"engine.optimize={engine.optimize.name}"
    if engine.optimize is Optimize.none and engine.eager != EagerConfig():
        warnings.warn(f"engine.eager has no effect with {how}", stacklevel=2)
    if engine.optimize is not Optimize.compile and engine.compile != CompileConfig():
        warnings.warn(f"engine.compile has no effect with {how}", stacklevel=2)
    if engine.optimize is Optimize.none:
        return
    if config.task.name is Task.train:
        raise ValueError(f"{how} has no effect on task=train; drop it")
    if engine.name == NATIVE and config.parallel.shard_weights:
        raise ValueError(
            f"{how} uses a block's weights apart from the block, and parallel.shard_weights=true deals them; use "
            "engine.optimize=none, or drop parallel.shard_weights"
        )
    if config.parallel.pipe > 1:
        raise ValueError(
            f"{how} computes for all blocks at once, and parallel.pipe={config.parallel.pipe} deals them; use "
            "engine.optimize=none, or drop parallel.pipe"
        )
    if engine.name in (CACHE_DIT, SGLANG) or (engine.name != NATIVE and engine.optimize is Optimize.eager):
        raise ValueError(f"{how} does not go with engine={engine.name}; use engine=native, or engine.optimize=none")
    if engine.name != NATIVE and engine.eager != EagerConfig():
        warnings.warn(f"engine.eager has no effect with engine={engine.name}", stacklevel=2)
