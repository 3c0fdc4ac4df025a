"""Applies engine.optimize to loaded components: each optimization in its order, and one line for the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from harness.config.optimize import Optimize
from harness.config.schema import EngineConfig
from harness.device.malloc import retain_freed_memory
from harness.optimize.compile_blocks import blocks_of, compile_forwards
from harness.optimize.decoder import apply_winograd, to_channels_last
from harness.optimize.fuse import fuse_projections
from harness.optimize.graphs import RecordedDecoder, RecordedNetwork, cuda_graph_recorder
from harness.optimize.precompute import PrecomputedModulation
from harness.optimize.prepack import prepack
from harness.optimize.upcast import should_upcast, upcast
from models.components import Components, Decoder, PromptEncoder, networks_in
from models.decoders import KLDecoder


@dataclass(frozen=True)
class OptimizedComponents:
    """The components to run, after optimization.

    Args:
        network: the network.
        decoder: the decoder.
        load_prompts: loads the prompt encoder.
        precompute: what precomputes modulation and text; None if the evaluations compute them.
        notes: what was applied, for the record.
    """

    network: nn.Module
    decoder: Decoder
    load_prompts: Callable[[], PromptEncoder]
    precompute: PrecomputedModulation | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReplaySupport:
    """Which components can be replayed from CUDA graphs.

    Such a component stays on the device, is whole on this rank, and computes the same way for every input.

    Args:
        network: whether the network can.
        decoder: whether the decoder can.
    """

    network: bool = True
    decoder: bool = True


def optimize(
    components: Components,
    engine: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    decoder_sharded: bool = False,
    replay: ReplaySupport = ReplaySupport(),
) -> OptimizedComponents:
    """Apply the configured optimizations that help on this device, in place.

    Args:
        components: the loaded components. Their linears are already sharded; blocks and tokens are not.
        engine: the configuration.
        device: the device that computes.
        dtype: the dtype of the network.
        decoder_sharded: whether the decoder's convolutions will be sharded over ranks, which needs plain ones.
        replay: what can be replayed from CUDA graphs, on a GPU.

    Returns:
        The components to run.
    """
    if engine.optimize is Optimize.none:
        return OptimizedComponents(components.network, components.decoder, components.load_prompts)
    eager, applied, precompute = engine.eager, [], None
    if components.precompute is not None and (eager.modulation or eager.text):
        text = eager.text and components.precompute.has_text
        precompute = PrecomputedModulation(components.network, components.precompute, eager.modulation, text)
        applied += ["precomputed modulation"] * eager.modulation + ["precomputed text"] * text
    if eager.fused_projections and fuse_projections(components.network, components.plan):
        applied.append("fused projections")
    load_prompts = components.load_prompts
    if eager.upcast and should_upcast(device, torch.bfloat16):
        load_prompts = partial(_upcast_prompts, load_prompts)
        upcast_counts = [upcast(part) for part in (components.network, *networks_in(components.decoder))]
        applied += ["products in float32"] * any(upcast_counts)
    blocks = blocks_of(components.network, components.plan)
    if engine.optimize is Optimize.compile:  # inductor packs weights itself, and takes no packed ones
        applied.append(f"blocks {compile_forwards(blocks or [components.network], engine.compile, device)}")
    elif blocks and eager.prepack and should_prepack(device, dtype):
        for block in blocks:
            prepack(block)
        applied.append("prepacked linears")
    if eager.channels_last and _prefers_channels_last(device) and to_channels_last(components.decoder):
        applied.append("channels-last decoder")
    if (
        eager.winograd
        and device.type == "cpu"
        and not decoder_sharded
        and apply_winograd(components.decoder, eager.upcast)
    ):
        applied.append("Winograd decoder")
    if eager.keep_memory and device.type == "cpu" and retain_freed_memory():
        applied.append("freed memory retained")
    network, decoder = components.network, components.decoder
    if eager.cuda_graphs and device.type == "cuda":
        record = cuda_graph_recorder()
        if replay.network and components.capturable:
            network = RecordedNetwork(network, record)
            applied.append("network in CUDA graphs")
        if replay.decoder and isinstance(decoder, KLDecoder):
            decoder = RecordedDecoder(decoder, record)
            applied.append("decoder in CUDA graphs")
    note = f"engine.optimize={engine.optimize.name}: {', '.join(applied) or 'nothing here'}"
    return OptimizedComponents(network, decoder, load_prompts, precompute, (note,))


def _upcast_prompts(load: Callable[[], PromptEncoder]) -> PromptEncoder:
    encoder = load()
    for network in networks_in(encoder):
        upcast(network)
    return encoder


def should_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether packed linears are faster here: in bfloat16 on a CPU with instructions for it.

    In float32 the products that PyTorch uses otherwise (MKL's) are faster; packed ones took 1.1 to 1.2 times as long on
    an AVX2 processor.

    Args:
        device: the device that computes.
        dtype: the dtype of the linears.

    Returns:
        Whether to prepack.
    """
    return device.type == "cpu" and dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _prefers_channels_last(device: torch.device) -> bool:
    """Return whether convolutions are faster with channels last: cuDNN's and oneDNN's are, PyTorch's own are not."""
    return device.type == "cuda" or bool(torch.backends.mkldnn.enabled)
