"""How a configuration's network is optimised; decided before a process starts, without torch."""

from __future__ import annotations

import warnings

from harness.config.optimize import CompileConfig, EagerConfig, Optimize
from harness.config.schema import RunConfig
from harness.resolve.conflicts import OPTIMIZE_CONFLICTS, refusal
from harness.resolve.engines_table import NATIVE


def resolve_optimize(config: RunConfig) -> None:
    """Replace engine.optimize=auto by what is done, and warn of keys that have no effect.

    auto is the fastest mode measured: eager wherever it works, for requests of any length. compile saved no more time
    and first has to make up for its slow first call.

    Args:
        config: The configuration, changed in place.
    """
    engine = config.engine
    if engine.optimize is Optimize.auto:
        engine.optimize = Optimize.eager
        if refusal(config, OPTIMIZE_CONFLICTS) is not None:
            engine.optimize = Optimize.none
    how = f"engine.optimize={engine.optimize.name}"
    if engine.optimize is Optimize.none and engine.eager != EagerConfig():
        warnings.warn(f"engine.eager has no effect with {how}", stacklevel=2)
    if engine.optimize is not Optimize.compile and engine.compile != CompileConfig():
        warnings.warn(f"engine.compile has no effect with {how}", stacklevel=2)
    if engine.optimize is not Optimize.none and engine.name != NATIVE and engine.eager != EagerConfig():
        warnings.warn(f"engine.eager has no effect with engine={engine.name}", stacklevel=2)
