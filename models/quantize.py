"""Linears in 8 bits, through torchao: a scale for every row of a weight, its largest magnitude / 127.5.

Which linears, the network's parallel plan says: those that tensor parallelism cuts are attention's and feed-forward's,
nearly all of a network's weights. What embeds, modulates and projects to the output keeps its dtype.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from models.plan import ParallelPlan
from models.source import Source

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

SAID = {"int8_weight_only": "int8 weights", "int8_dynamic": "int8 weights and inputs", "fp8": "fp8 weights and inputs"}
"""By scheme, what is in 8 bits; inputs are rounded as they come, with a scale a token (int8) or a tensor (fp8)."""


def quantize(network: nn.Module, plan: ParallelPlan, scheme: str, source: Source) -> None:
    """Puts a loaded denoiser's linears into 8 bits, in place, and notes what it then takes.

    Args:
        network: on its device; what a plan has cut of it must not be cut yet.
        plan: names the linears.
        scheme: a key of SAID.
        source: of the network, whose `loaded` is changed.

    Raises:
        NotImplementedError: fp8 away from CUDA.
        ValueError: a linear that torchao leaves as it was.
    """
    import torchao
    from torchao.quantization import quantize_

    wanted = linears(network, plan)
    quantize_(network, _config(scheme, source.device), lambda module, name: name in wanted)
    left = [name for name, linear in wanted.items() if not _is_composed(linear.weight)]
    if left:
        raise ValueError(f"torchao left {left[0]} and {len(left) - 1} other linears as they were; drop model.quantize")
    loaded = source.loaded[source.denoiser]
    source.loaded[source.denoiser] = replace(
        loaded,
        dtype=f"{loaded.dtype}, {SAID[scheme]} in {len(wanted)} linears (torchao {torchao.__version__})",
        bytes=sum(stored_bytes(parameter) for parameter in network.parameters()),
    )


def linears(network: nn.Module, plan: ParallelPlan) -> dict[str, nn.Linear]:
    """The linears of attention and feed-forward, by name."""
    patterns = (*plan.column, *plan.row, *plan.joined_rows)
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatch(name, pattern) for pattern in patterns)
    }


def stored_bytes(tensor: torch.Tensor) -> int:
    """What a tensor takes, one of torchao's the tensors that it is made of."""
    if not _is_composed(tensor):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


def _is_composed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of torchao's, made of others."""
    return is_traceable_wrapper_subclass(tensor)


def _config(scheme: str, device: torch.device) -> AOBaseConfig:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
    )
    from torchao.utils import should_reduce_range

    if scheme == "int8_weight_only":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if scheme == "int8_dynamic":  # processors without VNNI add products in 16 bits, which 8-bit factors overflow
        narrow = should_reduce_range(device)
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, reduce_range=narrow)
    if device.type != "cuda":
        raise NotImplementedError(
            f"model.quantize=fp8 computes on CUDA, and this rank on {device.type}; use model.quantize=int8_weight_only"
        )
    return Float8DynamicActivationFloat8WeightConfig(set_inductor_config=False)
