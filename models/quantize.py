"""Linears in 8 bits, through torchao: one scale per row of a weight, its largest magnitude / 127.5.

The network's parallel plan names the linears: those that tensor parallelism shards are attention's and feed-forward's,
nearly all of a network's weights. Embeddings, modulation and the output projection keep their dtype.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from models.checkpoint_source import CheckpointSource
from models.plan import ParallelPlan

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

SCHEME_LABELS = {
    "int8_weight_only": "int8 weights",
    "int8_dynamic": "int8 weights and inputs",
    "fp8": "fp8 weights and inputs",
}
"""What is in 8 bits, by scheme; each forward rounds inputs with one scale per token (int8) or per tensor (fp8)."""


def quantize(network: nn.Module, plan: ParallelPlan, scheme: str, source: CheckpointSource) -> None:
    """Quantize a loaded denoiser's linears to 8 bits, in place, and update the source's load report.

    Args:
        network: The network on its device, not sharded yet.
        plan: The parallel plan that names the linears.
        scheme: A key of SCHEME_LABELS.
        source: The network's checkpoint, whose `loaded` is updated.

    Raises:
        NotImplementedError: fp8 on a device other than CUDA.
        ValueError: A linear that torchao did not change.
    """
    import torchao
    from torchao.quantization import quantize_

    chosen = find_linears(network, plan)
    quantize_(network, _config(scheme, source.device), lambda module, name: name in chosen)
    left = [name for name, linear in chosen.items() if not _is_composed(linear.weight)]
    if left:
        raise ValueError(f"torchao did not quantize {left[0]} and {len(left) - 1} other linears; drop model.quantize")
    loaded = source.loaded[source.denoiser]
    source.loaded[source.denoiser] = replace(
        loaded,
        dtype=f"{loaded.dtype}, {SCHEME_LABELS[scheme]} in {len(chosen)} linears (torchao {torchao.__version__})",
        bytes=sum(stored_bytes(parameter) for parameter in network.parameters()),
    )


def find_linears(network: nn.Module, plan: ParallelPlan) -> dict[str, nn.Linear]:
    """Return the linears of attention and feed-forward, by name."""
    patterns = (*plan.column, *plan.row, *plan.joined_rows)
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatch(name, pattern) for pattern in patterns)
    }


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return the size of a tensor in bytes; for a torchao tensor, the sum over its inner tensors."""
    if not _is_composed(tensor):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


def _is_composed(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a torchao tensor, composed of others."""
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
    if scheme == "int8_dynamic":  # CPUs without VNNI add products in 16 bits, which full 8-bit factors overflow
        narrow = should_reduce_range(device)
        return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, reduce_range=narrow)
    if device.type != "cuda":
        raise NotImplementedError(
            f"model.quantize=fp8 computes on CUDA, and this rank on {device.type}; use model.quantize=int8_weight_only"
        )
    return Float8DynamicActivationFloat8WeightConfig(set_inductor_config=False)
