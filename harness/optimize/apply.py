"""engine.optimize, applied to what was loaded: each part in its order, and what was done in one line for the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from harness.config.optimize import Optimize
from harness.config.schema import EngineConfig
from harness.device.malloc import retain_freed_memory
from harness.optimize.ahead import Ahead
from harness.optimize.compiled import blocks_of, compile_forwards
from harness.optimize.decoder import channels_last, winograd
from harness.optimize.fuse import fuse_projections
from harness.optimize.graphs import RecordedDecoder, RecordedNetwork, in_cuda_graphs
from harness.optimize.prepack import prepack
from harness.optimize.widen import widen, widens
from models.components import Components, Decoder, PromptEncoder, networks_in
from models.decoders import KLDecoder


@dataclass(frozen=True)
class Optimized:
    """Network, decoder and prompt encoder as they are to be run, what computes beforehand, the notes for the record."""

    network: nn.Module
    decoder: Decoder
    load_prompts: Callable[[], PromptEncoder]
    ahead: Ahead | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Replayable:
    """Which of them stay on the device, whole on this rank, and compute the same way whatever they are handed."""

    network: bool = True
    decoder: bool = True


def optimize(
    parts: Components,
    engine: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    dealt: bool = False,
    replayed: Replayable = Replayable(),
) -> Optimized:
    """Does to loaded parts, in place, what is configured and what the device has use for.

    Args:
        parts: whose linears were cut already; before its blocks are put behind gates or its tokens dealt.
        engine: what is configured.
        device: where they compute.
        dtype: of the network.
        dealt: whether the decoder's convolutions will be dealt over ranks, which takes them as they are.
        replayed: which of network and decoder may be, on a GPU.
    """
    if engine.optimize is Optimize.none:
        return Optimized(parts.network, parts.decoder, parts.load_prompts)
    eager, done, ahead = engine.eager, [], None
    if parts.ahead is not None and (eager.modulation or eager.text):
        text = eager.text and parts.ahead.text
        ahead = Ahead(parts.network, parts.ahead, eager.modulation, text)
        done += ["modulation ahead"] * eager.modulation + ["text ahead"] * text
    if eager.fused_projections and fuse_projections(parts.network, parts.plan):
        done.append("fused projections")
    load_prompts = parts.load_prompts
    if eager.upcast and widens(device, torch.bfloat16):
        load_prompts = partial(_widened_prompts, load_prompts)
        wide = [widen(part) for part in (parts.network, *networks_in(parts.decoder))]
        done += ["products in float32"] * any(wide)
    blocks = blocks_of(parts.network, parts.plan)
    if engine.optimize is Optimize.compile:  # inductor packs weights itself, and takes no packed ones
        done.append(f"blocks {compile_forwards(blocks or [parts.network], engine.compile, device)}")
    elif blocks and eager.prepack and packs(device, dtype):
        for block in blocks:
            prepack(block)
        done.append("prepacked linears")
    if eager.channels_last and _lays_out(device) and channels_last(parts.decoder):
        done.append("channels-last decoder")
    if eager.winograd and device.type == "cpu" and not dealt and winograd(parts.decoder, eager.upcast):
        done.append("Winograd decoder")
    if eager.keep_memory and device.type == "cpu" and retain_freed_memory():
        done.append("freed memory kept")
    network, decoder = parts.network, parts.decoder
    if eager.cuda_graphs and device.type == "cuda":
        record = in_cuda_graphs()
        if replayed.network and parts.recordable:
            network = RecordedNetwork(network, record)
            done.append("network in CUDA graphs")
        if replayed.decoder and isinstance(decoder, KLDecoder):
            decoder = RecordedDecoder(decoder, record)
            done.append("decoder in CUDA graphs")
    note = f"engine.optimize={engine.optimize.name}: {', '.join(done) or 'nothing here'}"
    return Optimized(network, decoder, load_prompts, ahead, (note,))


def _widened_prompts(load: Callable[[], PromptEncoder]) -> PromptEncoder:
    encoder = load()
    for network in networks_in(encoder):
        widen(network)
    return encoder


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed linears are the faster ones here: in bfloat16 on a CPU with instructions for it. In float32 the
    products that PyTorch takes otherwise (MKL's) are; packed ones took 1.1 to 1.2 times as long on an AVX2 processor.
    """
    return device.type == "cpu" and dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _lays_out(device: torch.device) -> bool:
    """Whether convolutions here are faster with channels innermost: by cuDNN and oneDNN, not by plain ones."""
    return device.type == "cuda" or bool(torch.backends.mkldnn.enabled)
