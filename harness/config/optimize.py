"""`engine.optimize`: how a network is changed so that its evaluations take less time, with the same result."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from schedulers.options import option


class Optimize(Enum):
    """How far a network is optimised.

    `none` runs the network as it is written. `eager` precomputes, fuses and packs parts of it. `compile` compiles its
    blocks too. `auto` stands for one of these, chosen by harness.resolve.optimize.
    """

    auto = "auto"
    none = "none"
    eager = "eager"
    compile = "compile"


@dataclass
class EagerConfig:
    """`engine.eager`: the parts of optimize=eager; optimize=compile has them too, except prepack."""

    modulation: bool = option(
        True, "Precompute what depends only on time and vectors, for all evaluations of a request."
    )
    text: bool = option(True, "Precompute what depends only on the text, such as keys and values of cross-attention.")
    fused_projections: bool = option(True, "Compute queries, keys and values of a stream by one linear layer.")
    prepack: bool = option(
        True, "Pack weights in oneDNN's layout and fuse the GELU; in bfloat16 on the CPU, not compiled."
    )
    upcast: bool = option(True, "Compute products in float32; in bfloat16 on a CPU without instructions for it.")
    channels_last: bool = option(True, "Store the decoder's convolutions with the channels as innermost dimension.")
    cuda_graphs: bool = option(True, "Record and replay networks and decoders that one rank holds whole; on a GPU.")
    keep_memory: bool = option(True, "Keep freed memory for the next tensor; on the CPU, with glibc.")
    winograd: bool = option(
        True, "Compute the decoder's wide convolutions with 4 products per pixel; in float32 or upcast, on the CPU."
    )


@dataclass
class CompileConfig:
    """`engine.compile`: how optimize=compile compiles the blocks (torch.compile)."""

    freezing: bool = option(
        False, "Make weights constants of the graph, which inductor packs; one graph per block, on the CPU."
    )
    cuda_graphs: bool = option(False, "Compile diffusers' network with mode=reduce-overhead; on a GPU.")
