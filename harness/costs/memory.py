"""Memory that a rank needs, from shapes alone: weights exactly, activations by a stated rule.

With the letters of harness.costs.traffic, in elements of the network's dtype, one evaluation holds at its peak

    2 l C                   the residual stream of its widest stack, before and after a block
    4 x                     queries, keys, values and output of its widest attention,
    + 2 x (ring > 1)        keys and values in transit,
    + 3 x (ulysses > 1)     queries, keys and values before the all-to-all
    l (C_in + C_out)        of its widest linear; a side sharded over tp counts divided by tp
    L C                     the gathered output of a stack (T > 1)
    widest                  input and output of the widest layer outside of stacks (for a UNet: of the widest layer)

Decoding holds, for a rank's band of rows, the widest layer's input and output, and a residual as large as the output.
Not included: workspaces of kernels, fragmentation, skip connections of a UNet, frames that a video decoder caches, and
the runtime itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.costs.traffic import NetworkTrace, sharded_dim
from models.plan import ParallelPlan


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a network's parameters.

    Args:
        total: the bytes of all parameters.
        sharded: the bytes of the parameters that tensor parallelism shards.
    """

    total: int
    sharded: int

    def per_rank(self, tp: int) -> int:
        """Return the bytes on each of `tp` ranks."""
        return self.total - self.sharded + self.sharded // tp


def network_weights(network: nn.Module, plan: ParallelPlan) -> WeightBytes:
    """Return the bytes of a network's parameters in their own dtypes, sharded as harness.parallel.parallelize does."""
    sizes = {name: parameter.nbytes for name, parameter in network.named_parameters()}
    sharded = sum(size for name, size in sizes.items() if sharded_dim(network, name, plan) is not None)
    return WeightBytes(sum(sizes.values()), sharded)


def activation_elements(trace: NetworkTrace, degrees: tuple[int, ...]) -> int:
    """Return the elements that one evaluation holds at its peak on each rank."""
    _, _, tp, ring, ulysses = degrees
    sp = ring * ulysses
    streams = [(tokens.per_rank(sp) * channels, tokens.per_rank(1) * channels) for tokens, channels in trace.outputs]
    sharded, gathered = max((part for part, _ in streams), default=0), max((full for _, full in streams), default=0)
    of_attention = [call.tokens.per_rank(sp) * (call.heads // tp) * call.channels for call in trace.attention]
    linears = [
        call.tokens.per_rank(sp)
        * (
            call.inputs // (tp if call.sharded_dim == "inputs" else 1)
            + call.outputs // (tp if call.sharded_dim == "outputs" else 1)
        )
        for call in trace.linears
    ]
    copies = 4 + 2 * (ring > 1) + 3 * (ulysses > 1)
    return (
        2 * sharded
        + copies * max(of_attention, default=0)
        + max(linears, default=0)
        + gathered * (sp > 1)
        + trace.widest
    )


def decode_elements(decode: Callable[[Tensor], Tensor], layers: nn.Module, latents: Tensor) -> int:
    """Return the elements that decoding a batch on one rank holds at its peak.

    Args:
        decode: a function from latents to pixels, on the meta device.
        layers: the module that decodes.
        latents: the latents, on the meta device.
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
