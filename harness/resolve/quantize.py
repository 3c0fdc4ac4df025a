"""Whether a configuration's denoiser can be quantized; checked before a process starts, without torch."""

from __future__ import annotations

import importlib.util

from harness.config.optimize import Optimize
from harness.config.schema import Quantize, RunConfig
from harness.config.tasks import TRAITS
from harness.resolve.engines_table import NATIVE
from models.registry import ARCHITECTURES

PACKAGE = "torchao"


def check_quantize(config: RunConfig) -> None:
    """Refuse combinations that model.quantize does not support, and a machine without its package.

    Raises:
        ValueError: The combination cannot run; one line says what to change.
    """
    model, key = config.model, f"model.quantize={config.model.quantize.name}"
    if model.quantize is Quantize.none:
        return
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError(f"{key} needs the package {PACKAGE}: pip install 'triptych[quantize]', or drop it")
    if config.engine.name != NATIVE or not TRAITS[config.task.name].generates:
        raise ValueError(f"{key} changes the native network that generates; use engine=native, not task=train or plan")
    if ARCHITECTURES[model.architecture].heads is None:
        raise ValueError(
            f"{key} works on the linear layers of a transformer, and model={model.name} has a U-Net; drop it"
        )
    if config.engine.optimize is not Optimize.none:
        raise ValueError(
            f"{key} puts linear layers into a form that engine.optimize={config.engine.optimize.name} does not fuse or "
            "pack; use engine.optimize=none"
        )
    if config.parallel.tp > 1 or config.parallel.shard_weights or model.offload:
        raise ValueError(
            f"{key} keeps the weights of a rank whole and on one device; leave out parallel.tp, "
            "parallel.shard_weights=true and model.offload=true"
        )
