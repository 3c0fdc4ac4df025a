"""The stages round the native network, sharded over the ranks of the layout."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch

from harness.build.parts import cache_mib, check_multiple, limits_of, noise_scheduler_of
from harness.caching.policies import cached_network, guidance_when
from harness.config.cache import BLOCK_CACHES
from harness.config.schema import ParallelConfig, Quantize, RunConfig
from harness.optimize.apply import Replayable, optimize
from harness.parallel.attention import SequenceState
from harness.parallel.connect import Axes, connect
from harness.parallel.displaced import Displaced
from harness.parallel.mesh import Place
from harness.parallel.parallelize import cut_linears, deal_tokens
from harness.parallel.pipefusion import PipeFusion, drop_blocks
from harness.parallel.shard import shard_weights
from harness.parallel.stale import Stale
from harness.pipeline.composed import ComposedPipeline
from harness.pipeline.decode import Decoding
from harness.pipeline.denoise import Denoising, Savings
from harness.pipeline.executor import SyncExecutor
from harness.pipeline.latents import LatentPreparation
from harness.pipeline.offload import Offloaded
from harness.pipeline.stage import Stage
from harness.pipeline.text import PromptCache, TextEncoding
from harness.pipeline.timesteps import TimestepPreparation
from harness.pipeline.validate import InputValidation
from harness.resolve.checkpoint import COMPONENTS
from harness.resolve.engines_table import DIFFUSERS, NATIVE, SGLANG, baseline_attention
from harness.resolve.layout_rules import needs_lse, patches_of
from models.attention import attention_kernel, resolved_name
from models.attention.lse import lse_kernel
from models.components import ComponentLoader, Components, Decoder, networks_in
from models.parts import Cut
from models.quantize import quantize
from models.registry import ARCHITECTURES, resolve_backend
from models.source import Source


def backend_of(config: RunConfig, device: torch.device) -> str:
    """The attention backend that computes on the device."""
    return resolve_backend(config.attention.backend, device.type, with_lse=needs_lse(config.parallel))


def attention_name(config: RunConfig, device: torch.device) -> str:
    """What computes attention, by its own name.

    Raises:
        NotImplementedError: the backend that was asked for does not run on this machine.
    """
    if config.engine.name != NATIVE:
        return f"{SGLANG if config.engine.name == SGLANG else DIFFUSERS} {baseline_attention(config)}"
    return resolved_name(config.attention.backend, device.type, with_lse=needs_lse(config.parallel))


def deal(parts: Components, axes: Axes, backend: str, layout: ParallelConfig, state: SequenceState) -> Stale | None:
    """Deals the network's tokens or blocks over this rank's axes, in place; what it keeps between evaluations, if any.
    How tokens are dealt, the state says.

    Raises:
        ValueError: an attention backend that ring attention cannot use.
    """
    if layout.pipe > 1:
        pipeline = PipeFusion(axes.ring, patches_of(layout), layout.warmup)
        pipeline.install(parts.network, parts.plan, attention_kernel(backend))
        return pipeline
    if axes.tokens.size == 1:
        return None
    displaced = Displaced(axes.ring, layout.warmup) if layout.displaced else None
    ring_kernel = lse_kernel(backend) if needs_lse(layout) else None
    kernel = attention_kernel(backend)
    deal_tokens(parts.network, parts.plan, kernel, ring_kernel, axes, state=state, displaced=displaced)
    return displaced


def native_pipeline(config: RunConfig, source: Source, place: Place) -> tuple[ComposedPipeline, Axes]:
    """The stages around the native network, and the axes of ranks that it is dealt over.

    Raises:
        CheckpointError: weights that are missing, broken or do not fit.
        ValueError: settings that do not go together.
    """
    model = config.model
    waiting = timedelta(seconds=config.launch.collective_timeout_s)
    axes = connect(place, source.device, waiting)  # before loading, which may take the ranks unequal times
    load: ComponentLoader = importlib.import_module(ARCHITECTURES[model.architecture].module).load
    backend = backend_of(config, source.device)
    cut: Cut | None = partial(cut_linears, group=axes.tp) if axes.tp.size > 1 else None
    if config.parallel.pipe > 1:
        cut = partial(drop_blocks, group=axes.ring)
    homes = dict.fromkeys(away(config, source), torch.device("cpu"))
    parts = load(replace(source, cut=cut, devices=homes), attention_kernel(backend))
    check_multiple(model, parts)
    if model.quantize is not Quantize.none:
        quantize(parts.network, parts.plan, model.quantize.name, source)
    dtype = source.dtype_of(source.denoiser)
    made = optimize(parts, config.engine, source.device, dtype, axes.picture.size > 1, replayable(config, axes))
    state = SequenceState()
    gated = cached_network(config.cache, parts.network, parts.plan, axes.picture, state)  # before what hooks its blocks
    stale = deal(parts, axes, backend, config.parallel, state)
    if config.parallel.shard_weights:
        shard_weights(parts.network, parts.plan, axes.weights, source.device)
    noise_scheduler = noise_scheduler_of(config, source, parts)
    text = TextEncoding(made.load_prompts, parts.guidance, PromptCache(cache_mib(config)), model.text.keep_loaded)
    network = made.network if gated is None else gated
    savings = Savings(made.ahead, guidance_when(config.cache), gated is not None, stale, made.notes)
    denoising = Denoising(network, dtype, noise_scheduler, parts.guidance, axes.cfg, savings)
    decoding = Decoding(decoder_of(made.decoder, axes, config.parallel))

    def homed(stage: Stage, part: object) -> Stage:
        return Offloaded(stage, networks_in(part), source.device) if model.offload else stage

    stages = [
        homed(text, text.encoder),
        TimestepPreparation(noise_scheduler, parts.size_multiple),
        LatentPreparation(parts.latent, noise_scheduler),
        homed(denoising, parts.network),
        homed(decoding, parts.decoder),
    ]
    return ComposedPipeline(InputValidation(limits_of(config, parts), noise_scheduler), stages, SyncExecutor()), axes


def replayable(config: RunConfig, axes: Axes) -> Replayable:
    """What may be replayed: not what is dealt, carried from and to the CPU, or cut short by a cache of blocks."""
    here = not (config.model.offload or config.parallel.shard_weights)
    whole = axes.tp.size == axes.tokens.size == 1 and config.cache.name not in BLOCK_CACHES
    return Replayable(network=here and whole, decoder=here and axes.picture.size == 1)


def decoder_of(decoder: Decoder, axes: Axes, layout: ParallelConfig) -> Decoder:
    """The decoder as it is, or dealt over the ranks of a picture.

    Raises:
        ValueError: frames of a decoder of pictures.
    """
    if axes.picture.size == 1:
        return decoder

    from harness.parallel.vae import parallel_decoder  # brings every autoencoder that can be dealt

    return parallel_decoder(decoder, axes.picture, layout.decode)


def away(config: RunConfig, source: Source) -> list[str]:
    """The components that are loaded to CPU memory, wherever they compute.

    Raises:
        NotImplementedError: offload on a machine that has no other memory.
    """
    if config.model.offload and source.device.type == "cpu":
        raise NotImplementedError(
            "model.offload=true takes networks from a GPU's memory to the CPU's, and this machine has no GPU"
        )
    return [source.denoiser, *COMPONENTS] if config.model.offload else [source.denoiser] * config.parallel.shard_weights
