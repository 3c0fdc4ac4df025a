"""`engine.optimize`: what is done to a network so that its evaluations take less time, with the same result."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Optimize(Enum):
    """`none` runs the network as it is written; `eager` computes, joins and packs parts of it beforehand; `compile`
    compiles its blocks too; `auto` is one of them, which harness.resolve.optimize puts in its place.
    """

    auto = "auto"
    none = "none"
    eager = "eager"
    compile = "compile"


@dataclass
class EagerConfig:
    """`engine.eager`: what optimize=eager does, and compile too but for prepack, each for itself."""

    modulation: bool = True  # what depends on time and vectors alone, once a request for all evaluations
    text: bool = True  # what depends on the text alone, keys and values of cross-attention too, once a request
    fused_projections: bool = True  # queries, keys and values of a stream by one linear
    prepack: bool = True  # bfloat16 on the CPU, not compiled: weights in oneDNN's own order, the GELU in the product
    widen: bool = True  # bfloat16 on a CPU without instructions for it: products of float32 numbers
    channels_last: bool = True  # the decoder's convolutions with their channels innermost
    cuda_graphs: bool = True  # on a GPU: network and decoder, where one rank has them whole, are recorded and replayed
    keep_memory: bool = True  # on the CPU: freed memory is kept for the next tensor (glibc)
    winograd: bool = True  # float32, or widened, on the CPU: the decoder's wide convolutions with 4 products a pixel


@dataclass
class CompileConfig:
    """`engine.compile`: how optimize=compile compiles the blocks (torch.compile)."""

    freezing: bool = False  # on the CPU: weights are constants of the graph, which inductor packs; a graph a block
    cuda_graphs: bool = False  # of diffusers' network, on a GPU: mode=reduce-overhead
