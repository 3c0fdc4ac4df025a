"""Whether a configuration's denoiser can be quantised; asked before a process starts, without torch."""

from __future__ import annotations

import importlib.util

from harness.config.optimize import Optimize
from harness.config.schema import Quantize, RunConfig, Task
from harness.resolve.engines_table import NATIVE
from models.registry import ARCHITECTURES

PACKAGE = "torchao"


def check_quantize(config: RunConfig) -> None:
    """Refuses what model.quantize does not go together with, and a machine without its package.

    Raises:
        ValueError: what to change, in one line.
    """
    model, asked = config.model, f"model.quantize={config.model.quantize.name}"
    if model.quantize is Quantize.none:
        return
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError(f"{asked} needs the package {PACKAGE}: pip install 'triptych[quantize]', or drop it")
    if config.engine.name != NATIVE or config.task.name in (Task.train, Task.plan):
        raise ValueError(f"{asked} changes the native network that draws; use engine=native, not task=train or plan")
    if ARCHITECTURES[model.architecture].heads is None:
        raise ValueError(f"{asked} works on the linears of a transformer, and model={model.name} has a U-Net; drop it")
    if config.engine.optimize is not Optimize.none:
        raise ValueError(
            f"{asked} puts linears into a form that engine.optimize={config.engine.optimize.name} does not join or "
            "pack; use engine.optimize=none"
        )
    if config.parallel.tp > 1 or config.parallel.shard_weights or model.offload:
        raise ValueError(
            f"{asked} keeps a rank's weights whole, and on one device; leave out parallel.tp, "
            "parallel.shard_weights=true and model.offload=true"
        )
