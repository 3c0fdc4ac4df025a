"""From a configuration to a worker: device, components, noise scheduler, stages. The one place that joins them."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from harness.caching.policies import cached_network, guidance_when
from harness.config.cache import OF_BLOCKS
from harness.config.schema import Load, ModelConfig, ParallelConfig, Quantize, RunConfig, Task
from harness.device.device import denoiser_dtype, prepare_cuda, torch_dtype
from harness.messages import GenerationRequest, LoadedComponent
from harness.metrics.cuda import CudaEnergy, CudaMemory, synchronizer
from harness.metrics.energy import Energy, NoEnergy, PackageEnergy
from harness.metrics.flops import ceiling_tflops
from harness.metrics.memory import Memory, ResidentMemory
from harness.optimize.apply import Replayable, optimize
from harness.optimize.widen import widens
from harness.parallel.attention import SequenceState
from harness.parallel.connect import Axes, connect, one_rank
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
from harness.pipeline.validate import InputValidation, Limits
from harness.resolve.checkpoint import COMPONENTS, locate
from harness.resolve.engines_table import DIFFUSERS, NATIVE, SGLANG, peer_attention
from harness.resolve.layout import layout_facts, of_request
from harness.resolve.layout_rules import check_layout, merges, patches_of
from harness.resolve.published_scheduler import scheduler_file
from harness.resolve.scheduler import noise_scheduler_settings
from harness.resolve.trained import PUBLISHED_FAMILY, trained_denoiser
from harness.serving.worker import Worker
from models.attention import attention_kernel, resolved_name
from models.attention.lse import lse_kernel
from models.components import ComponentLoader, Components, Decoder, networks_in
from models.parts import Cut
from models.quantize import quantize
from models.registry import ARCHITECTURES, resolve_backend
from models.source import LoraFile, Source
from schedulers.build import build as build_noise_scheduler
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import LearnedVariance
from schedulers.published import from_diffusers

DEFAULT_CACHE_MIB = 64.0


def source_of(config: RunConfig, device: torch.device) -> Source:
    """Where this run's components are read from.

    Raises:
        CheckpointError: no such folder or file.
    """
    model, denoiser = config.model, trained_denoiser(config).weights
    place = locate(model, denoiser)
    return Source(
        folder=place.folder,
        denoiser=denoiser,
        device=device,
        dtype=torch_dtype(model.dtype),
        dtypes={name: torch_dtype(dtype) for name, dtype in place.dtypes.items()},
        replaced=place.replaced,
        dummy=model.load is Load.dummy,
        text_tokens=model.text.tokens,
        loras=tuple(LoraFile(Path(lora.path).expanduser(), lora.weight) for lora in model.lora),
    )


def noise_scheduler_of(config: RunConfig, source: Source, parts: Components) -> NoiseScheduler:
    """The run's noise scheduler: the checkpoint's own, or the one that group `scheduler` composes.

    Raises:
        ValueError: a published configuration, or settings, that cannot run.
    """
    if config.scheduler.family == PUBLISHED_FAMILY:
        found = from_diffusers(scheduler_file(source.folder), even_sigmas=parts.even_sigmas)
    else:
        found = build_noise_scheduler(noise_scheduler_settings(config.scheduler))
    told = isinstance(found.prediction, LearnedVariance)
    if told and not parts.learned_variance:
        family = config.scheduler.family
        own = family == PUBLISHED_FAMILY
        change = "choose another noise scheduler" if own else f"set model.trained.{family}.learned_variance=false"
        raise ValueError(
            "the noise scheduler expects a learned variance, but this network outputs no more channels than the state "
            f"has; {change}"
        )
    if parts.learned_variance and not told:
        found = replace(found, prediction=LearnedVariance(found.prediction, use=False))
    return found


def limits_of(config: RunConfig, parts: Components) -> Limits:
    """What the configuration, its layout and the checkpoint let a request ask."""
    model, denoiser = config.model, trained_denoiser(config).weights
    facts = layout_facts(config, locate(model, denoiser).config_folder(denoiser))

    def check(request: GenerationRequest) -> None:
        check_layout(config.parallel, of_request(facts, model, request))

    return Limits(
        model.size_multiple,
        model.max_pixels,
        model.frame_multiple,
        model.max_frames,
        parts.max_side,
        parts.guidance.possible,
        parts.check_prompt,
        check,
    )


def cache_mib(config: RunConfig) -> float:
    """MiB of encoded prompts to keep: a bench encodes every time, to measure it, unless the encoders are dropped."""
    text = config.model.text
    if text.cache_mib is not None:
        return text.cache_mib
    return 0.0 if config.task.name is Task.bench and text.keep else DEFAULT_CACHE_MIB


def backend_of(config: RunConfig, device: torch.device) -> str:
    """The attention backend that computes on the device."""
    return resolve_backend(config.attention.backend, device.type, with_lse=merges(config.parallel))


def attention_name(config: RunConfig, device: torch.device) -> str:
    """What computes attention, by its own name.

    Raises:
        NotImplementedError: the backend that was asked for does not run on this machine.
    """
    if config.engine.name != NATIVE:
        return f"{SGLANG if config.engine.name == SGLANG else DIFFUSERS} {peer_attention(config)}"
    return resolved_name(config.attention.backend, device.type, with_lse=merges(config.parallel))


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
    ring_kernel = lse_kernel(backend) if merges(layout) else None
    kernel = attention_kernel(backend)
    deal_tokens(parts.network, parts.plan, kernel, ring_kernel, axes, state=state, displaced=displaced)
    return displaced


def ceiling(config: RunConfig, device: torch.device) -> float:
    """The rate of a matrix product on this rank in the denoiser's dtype, or in float32 where that is how it is computed
    best, TFLOP/s; 0 where nothing is measured.
    """
    if config.task.name is not Task.bench:
        return 0.0
    dtype = torch_dtype(denoiser_dtype(config.model))
    return ceiling_tflops(device, torch.float32 if widens(device, dtype) else dtype, synchronizer(device))


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
    text = TextEncoding(made.load_prompts, parts.guidance, PromptCache(cache_mib(config)), model.text.keep)
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
    whole = axes.tp.size == axes.tokens.size == 1 and config.cache.name not in OF_BLOCKS
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


def peer_pipeline(config: RunConfig, source: Source) -> ComposedPipeline:
    """The stages around diffusers' pipeline of the checkpoint.

    Raises:
        CheckpointError: weights that are missing, broken or do not fit.
        ValueError: settings that do not go together.
    """
    from harness.baselines.build import native_facts, peer_stages  # brings diffusers' pipelines

    parts = native_facts(config.model.architecture, source)
    check_multiple(config.model, parts)
    noise_scheduler, limits = noise_scheduler_of(config, source, parts), limits_of(config, parts)
    found = peer_stages(config, source, parts, noise_scheduler, limits, cache_mib(config))
    return ComposedPipeline(found.validation, found.stages, SyncExecutor())


def check_multiple(model: ModelConfig, parts: Components) -> None:
    """Refuses a multiple of sizes that the checkpoint's tokens do not divide.

    Raises:
        ValueError: the multiple to set.
    """
    if model.size_multiple % parts.size_multiple:
        raise ValueError(
            f"model.size_multiple={model.size_multiple}, but this checkpoint draws multiples of {parts.size_multiple} "
            f"pixels; set model.size_multiple={parts.size_multiple}"
        )


def build_worker(config: RunConfig, place: Place, device: torch.device) -> Worker:
    """Loads the components on the device and composes the pipeline.

    Raises:
        CheckpointError: weights that are missing, broken or do not fit.
        ValueError: settings that do not go together.
    """
    if device.type == "cuda":
        prepare_cuda(device)
    source = source_of(config, device)
    if config.engine.name == NATIVE:
        pipeline, axes = native_pipeline(config, source, place)
    else:
        pipeline, axes = peer_pipeline(config, source), one_rank()
    memory: Memory = CudaMemory(device) if device.type == "cuda" else ResidentMemory()
    memory.release()  # of what loading took and left
    energy = energy_meter(device)
    loaded = [
        LoadedComponent(p.component, str(p.path), p.dtype, p.parameters, p.bytes, p.load_ms, p.merged, p.read_bytes)
        for p in source.loaded.values()
    ]
    return Worker(pipeline, place, device, memory, loaded, axes, energy)


def energy_meter(device: torch.device) -> Energy:
    """Of a GPU where NVML is installed; of the machine's processors on its first rank."""
    if device.type == "cuda":
        return CudaEnergy(device) if importlib.util.find_spec("pynvml") else NoEnergy()
    return PackageEnergy() if os.environ.get("LOCAL_RANK", "0") == "0" else NoEnergy()
