"""How much memory a rank needs, from shapes alone: weights exactly, activations by a stated rule.

With the letters of harness.costs.traffic, in numbers of the network's dtype, one evaluation holds at its peak

    2 l C                   the residual stream of its widest stack, before and after a block
    4 x                     queries, keys, values and output of its widest attention,
    + 2 x (ring > 1)        keys and values that are on their way,
    + 3 x (ulysses > 1)     queries, keys and values as they were dealt
    l (C_in + C_out)        of its widest linear, a side that is cut over tp
    L C                     what a stack returns, gathered (T > 1)
    widest                  in and out of the widest layer outside of stacks (of a UNet: of the widest layer)

and decoding its band of rows the widest layer's input and output, and an output-sized residual. Not in it: workspaces
of kernels, fragmentation, skip connections of a UNet, frames that a video decoder keeps, and the runtime itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from harness.costs.traffic import NetworkTrace
from models.plan import ParallelPlan


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a network's parameters.

    Args:
        whole: of all of them.
        cut: of those that tensor parallelism divides.
    """

    total: int
    cut: int

    def per_rank(self, tp: int) -> int:
        """Bytes on one rank of so many."""
        return self.total - self.cut + self.cut // tp


def network_weights(network: nn.Module, plan: ParallelPlan) -> WeightBytes:
    """What a network's parameters take, in their own dtypes, by what harness.parallel.parallelize cuts."""
    cut = 0
    for name, module in network.named_modules():
        rows = isinstance(module, nn.Linear) and _named(name, (*plan.row, *plan.joined_rows))
        columns = isinstance(module, nn.Linear) and _named(name, plan.column)
        norms = isinstance(module, nn.RMSNorm) and _named(name, plan.head_norms)
        for key, parameter in module.named_parameters(recurse=False):
            if columns or norms or (rows and key == "weight"):
                cut += parameter.nbytes
    return WeightBytes(sum(parameter.nbytes for parameter in network.parameters()), cut)


def activation_elements(trace: NetworkTrace, degrees: tuple[int, ...]) -> int:
    """Numbers that one evaluation holds at its peak, on each rank."""
    _, _, tp, ring, ulysses = degrees
    shared = ring * ulysses
    streams = [
        (tokens.per_rank(shared) * channels, tokens.per_rank(1) * channels) for tokens, channels in trace.outputs
    ]
    dealt, gathered = max((part for part, _ in streams), default=0), max((full for _, full in streams), default=0)
    of_attention = [call.tokens.per_rank(shared) * (call.heads // tp) * call.channels for call in trace.attention]
    linears = [
        call.tokens.per_rank(shared)
        * (call.inputs // (tp if call.cut == "inputs" else 1) + call.outputs // (tp if call.cut == "outputs" else 1))
        for call in trace.linears
    ]
    copies = 4 + 2 * (ring > 1) + 3 * (ulysses > 1)
    return (
        2 * dealt
        + copies * max(of_attention, default=0)
        + max(linears, default=0)
        + gathered * (shared > 1)
        + trace.widest
    )


def displaced_elements(trace: NetworkTrace, degrees: tuple[int, ...]) -> int:
    """What a rank of displaced patches keeps: of every attention the keys and values of the whole ring, padding too."""
    _, _, tp, ring, ulysses = degrees
    parts = (
        call.tokens.per_rank(ring * ulysses) * (-(-(call.heads // tp) // ulysses) * ulysses) * call.channels
        for call in trace.attention
    )
    return 2 * ring * sum(parts)


def decode_elements(decode: Callable[[Tensor], Tensor], layers: nn.Module, latents: Tensor) -> int:
    """Numbers that decoding a batch on one rank holds at its peak.

    Args:
        decode: latents to pixels, on the meta device.
        layers: the module that does it.
        latents: on the meta device.
    """
    widest = 0

    def measure(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal widest
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            widest = max(widest, args[0].numel() + 2 * output.numel())

    handles = [layer.register_forward_hook(measure) for layer in layers.modules() if not list(layer.children())]
    with torch.no_grad():
        decode(latents)
    for handle in handles:
        handle.remove()
    return widest


def _named(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
