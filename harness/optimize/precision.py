"""Compares operators that exist in one dtype only with the same rounded numbers computed in float64.

A run in bfloat16 is compared with one in float32, which has other code: packed linears, products in float32, and
attention kernels are chosen by dtype. So each operator that was replaced is run alone, on a small random input. Its
output must be that of the module as it was written, computed in float64 from the same rounded inputs and weights.

The bound of a linear or a convolution is three times the error of rounding the exact output to the dtype once, which
is what an operator with sums in float32 makes, plus 2 sqrt(K) u for the K terms of these sums, with float32's unit
roundoff u = 2^-24. Three, because a processor may round its partial sums too. In bfloat16 the bound is about 0.005.
The worst of up to three parts of the output counts. They are random inputs; zeros, whose output is the bias; and, if a
GELU is part of the operator, the outputs between -3.5 and -2.5 before it, where its two forms differ by 4 %.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from harness.optimize.precompute import OutputSlice, Passthrough
from harness.optimize.winograd import WinogradConv2d
from harness.parallel.parallelize import ColumnParallelLinear, RowParallelLinear
from models.layers import QKVProjection

LINEARS = (nn.Linear, ColumnParallelLinear, RowParallelLinear)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FEATURES = 128
"""Output features that are computed in float64: enough of every head, few enough for the largest weights."""
ROWS = 16
"""Rows of a linear's input; with fewer than 8 harness.optimize.upcast leaves a product as it is."""
SIDES = (7, 5, 3)
"""Sides of a convolution's input, from the last one on; no multiples of a tile."""
OUTPUT_STD = 3.0
"""The size of random outputs, so that a GELU after them gets its whole range."""
GELU_TAIL = (-3.5, -2.5)
ROUNDINGS = 3.0


@dataclass(frozen=True)
class PlainOperator:
    """An operator as the network was written.

    Args:
        path: the name of its module, or of the module whose queries, keys and values one linear may compute.
        kind: the class of that module.
        plain: a copy of the module, with the weights of some output features only.
        features: the numbers of these features among all.
        activation: the activation that may become a part of the operator.
        feature_dim: the dimension of an output's features.
        input_shape: the shape of its input.
        weight_shape: the shape of its whole weight.
    """

    path: str
    kind: type[nn.Module]
    plain: nn.Module
    features: Tensor
    activation: nn.Module | None
    feature_dim: int
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]


@dataclass(frozen=True)
class ReplacedOperator:
    """What computes an operator now.

    Args:
        name: the name of its class, its sizes, and what else is part of it.
        forward: the computation.
        activation: the activation that is part of it.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    activation: nn.Module | None


def plain_operators(network: nn.Module, unused: Sequence[str] = ()) -> tuple[list[PlainOperator], bool]:
    """Return the operators of a network that may be replaced, one for each name (but for numbers) and size.

    Args:
        network: the network, before it is optimized; its linears may be sharded already.
        unused: the names of its modules that are not part of a request.

    Returns:
        The operators; and whether there are quantized weights, which are left out.
    """
    found: dict[tuple[object, ...], PlainOperator] = {}
    quantized = False
    for path, module in network.named_modules():
        weights = [w for w in _weights_of(module) if w is not None]
        if not weights or path.split(".")[0] in unused:
            continue
        if any(type(weight.data) is not Tensor for weight in weights):
            quantized = True
            continue
        key = (pattern_of(path), type(module), *(weight.shape for weight in weights))
        if key not in found:
            found[key] = _plain_operator(network, path, module, weights)
    return list(found.values()), quantized


def _weights_of(module: nn.Module) -> list[Tensor | None]:
    """Return the weights of a linear, a convolution, or a module that has some of its own; none for others."""
    if isinstance(module, QKVProjection):
        linears = [module.to_q, module.to_k, module.to_v]
        return [linear.weight for linear in linears] if all(isinstance(x, LINEARS) for x in linears) else []
    if isinstance(module, Upsample2D):
        plain = module.interpolate and module.norm is None and isinstance(module.conv, nn.Conv2d)
        return [module.conv.weight] if plain else []
    return [module.weight] if isinstance(module, (*LINEARS, *CONVOLUTIONS)) else []


def _plain_operator(network: nn.Module, path: str, module: nn.Module, weights: Sequence[Tensor]) -> PlainOperator:
    out, inner = len(weights[0]), weights[0].shape[1:]
    grouped = isinstance(module, CONVOLUTIONS) and module.groups > 1
    chosen = torch.arange(out) if grouped else torch.linspace(0, out - 1, min(out, FEATURES)).round().long()
    chosen = chosen.to(weights[0].device)
    if isinstance(module, QKVProjection):
        parts = [
            copy_module(linear, lambda x: x.index_select(0, chosen))
            for linear in (module.to_q, module.to_k, module.to_v)
        ]
        plain, bias = parts[0], parts[0].bias
        plain.weight = nn.Parameter(torch.cat([part.get_parameter("weight") for part in parts]), requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(torch.cat([part.get_parameter("bias") for part in parts]), requires_grad=False)
        features = torch.cat([chosen + len(weight) * n for n, weight in enumerate(weights)])
    else:
        plain, features = copy_module(module, lambda x: x.index_select(0, chosen)), chosen
    parent, _, leaf = path.rpartition(".")
    activation = network.get_submodule(parent)._modules.get("activation") if leaf == "up" else None
    linear = len(inner) == 1
    channels = inner[0] * (module.groups if isinstance(module, CONVOLUTIONS) else 1)
    sides = [max(side, 2 * kernel) for side, kernel in zip(SIDES, reversed(inner[1:]), strict=False)]
    return PlainOperator(
        path,
        type(module),
        plain,
        features,
        activation,
        feature_dim=-1 if linear else 1,
        input_shape=(2, ROWS, channels) if linear else (2, channels, *reversed(sides)),
        weight_shape=(sum(len(weight) for weight in weights), *inner),
    )


def copy_module(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a module of the same class with changed parameters; it shares everything else."""
    copied = copy.copy(module)
    copied._parameters = {
        name: None if x is None else nn.Parameter(change(x.detach()), requires_grad=False)
        for name, x in module._parameters.items()
    }
    copied._buffers = dict(module._buffers)
    copied._modules = {name: None if x is None else copy_module(x, change) for name, x in module._modules.items()}
    return copied


def replaced_operator(network: nn.Module, operator: PlainOperator) -> ReplacedOperator | None:
    """Return what computes an operator now; None if that is the module as it was written, or part of a larger operator.

    Args:
        network: the optimized network.
        operator: the operator as the network was written.

    Returns:
        What replaces it.
    """
    module = _current_module(network, operator.path)
    if isinstance(module, QKVProjection):
        projection = module.to_qkv
        return (
            None if projection is None else _name_operator(operator, projection, lambda x: torch.cat(module.qkv(x), -1))
        )
    if module is None or type(module) is operator.kind:
        return None
    forward = module.partial_product if isinstance(module, RowParallelLinear) else module
    if operator.activation is None:
        return _name_operator(operator, module, forward)
    parent = _current_module(network, operator.path.rpartition(".")[0])
    activation = None if parent is None else parent._modules.get("activation")
    if activation is None or activation is operator.activation:
        return _name_operator(operator, module, forward)
    return _name_operator(operator, module, lambda x: activation(forward(x)), operator.activation)


def _name_operator(
    operator: PlainOperator,
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    activation: nn.Module | None = None,
) -> ReplacedOperator:
    name = f"{type(module).__name__} {'x'.join(map(str, operator.weight_shape))}"
    name += f", step {module.step}" if isinstance(module, WinogradConv2d) else ""
    name += "" if _has_bias(operator.plain) else ", no bias"
    return ReplacedOperator(name + ", with its activation" * (activation is not None), forward, activation)


def _has_bias(module: nn.Module) -> bool:
    return any(name.endswith("bias") for name, _ in module.named_parameters())


def _current_module(network: nn.Module, path: str) -> nn.Module | None:
    """Return the module of a name now, also if its output is precomputed; None if there is none."""
    module: nn.Module | None = network
    for name in path.split(".") if path else ():
        module = None if module is None else _precomputed(module)._modules.get(name)
    return None if module is None else _precomputed(module)


def _precomputed(module: nn.Module) -> nn.Module:
    """Return the module whose output is precomputed, if this stands in for it; else the module itself."""
    return module.source if isinstance(module, OutputSlice | Passthrough) else module


def pattern_of(path: str) -> str:
    """Return a module's name with * for numbers, or `network` for a network that is one operator."""
    return re.sub(r"\b\d+\b", "*", path) or "network"


def operator_error(
    operator: PlainOperator, replaced: ReplacedOperator, generator: torch.Generator
) -> tuple[float, float]:
    """Return the relative L2 error of a replaced operator, and its bound, for the worst part of its output.

    Args:
        operator: the operator as the network was written.
        replaced: what computes it now.
        generator: the source of the random inputs.

    Returns:
        The error and the bound.
    """
    weight = next(operator.plain.parameters())
    plain = copy_module(operator.plain, lambda x: x.double())
    exact_forward = plain.partial_product if isinstance(plain, RowParallelLinear) else plain
    x = torch.randn(operator.input_shape, generator=generator, dtype=torch.float64).to(weight.device)
    x[1] = 0
    size = float(next(plain.parameters()).flatten(1).square().sum(dim=1).mean().sqrt())  # of the products, on average
    x = (x * (OUTPUT_STD / size if size > 0 else 1.0)).to(weight.dtype)
    before = exact_forward(x.double())
    found = replaced.forward(x).index_select(operator.feature_dim, operator.features).double()
    exact = before if replaced.activation is None else replaced.activation(before)
    parts = [(found[0], exact[0]), (found[1], exact[1])]
    if replaced.activation is not None:
        tail = (before > GELU_TAIL[0]) & (before < GELU_TAIL[1])
        parts.append((found[tail], exact[tail]))
    float32_sums = 2 * math.sqrt(weight[0].numel()) * 2**-24
    rows = [
        (relative_error(made, wanted), ROUNDINGS * relative_error(wanted.to(weight.dtype), wanted) + float32_sums)
        for made, wanted in parts
    ]
    return max(rows, key=lambda row: row[0] / row[1])


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return |found - exact| / |exact|; 1 if a number is not finite, or if the exact ones alone are all 0."""
    if not bool(found.isfinite().all()):
        return 1.0
    error, size = float((found.double() - exact).norm()), float(exact.norm())
    return error / size if size > 0 else float(error > 0)
