"""The stages around the native network, sharded over the ranks of the layout."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import partial

import torch

from harness.build.common import cache_mib, limits_of, noise_scheduler_of, solver_choice
from harness.caching.policies import cached_network, guidance_schedule
from harness.config.cache import is_block_cache
from harness.config.engines import CACHE_DIT, DIFFUSERS
from harness.config.kinds import GUIDANCE_RULES
from harness.config.schema import ParallelConfig, Quantize, RunConfig
from harness.optimize.apply import OptimizedComponents, ReplaySupport, optimize
from harness.optimize.operator_check import OperatorCheck
from harness.parallel.attention import SequenceState
from harness.parallel.displaced import DisplacedPatches
from harness.parallel.fsdp import apply_fsdp
from harness.parallel.parallelize import shard_linears, shard_tokens
from harness.parallel.pipefusion import PipeFusion, drop_blocks
from harness.parallel.process_groups import ProcessGroups
from harness.parallel.stale_kv import StaleKVCache
from harness.pipeline.composed import ComposedPipeline, with_own_stages
from harness.pipeline.decode import Decoding
from harness.pipeline.denoise import Denoising, DenoisingOptions
from harness.pipeline.executor import SyncExecutor
from harness.pipeline.guidance import Combine
from harness.pipeline.latents import LatentPreparation
from harness.pipeline.offload import OffloadedStage
from harness.pipeline.stage import Stage
from harness.pipeline.text import PromptCache, TextEncoding
from harness.pipeline.timesteps import TimestepPreparation
from harness.pipeline.validate import InputValidation
from harness.plugins.options import own_options
from harness.resolve.checkpoint import COMPONENTS
from harness.resolve.image_sides import check_size_multiple
from harness.resolve.layout_rules import patches_of
from harness.resolve.run import ResolvedRun
from models.attention import attention_kernel, resolved_name
from models.attention.lse import lse_kernel
from models.blocks import RunnerFeature, unwrap_runners, wrap_runners
from models.checkpoint_source import CheckpointSource
from models.components import ComponentLoader, Components, Decoder, networks_in
from models.quantize import quantize
from models.registry import ARCHITECTURES
from models.tensor_slice import ShardWeights
from schedulers.registry import imported


def attention_name(run: ResolvedRun, device: torch.device) -> str:
    """Return the name of the kernel that computes attention.

    Args:
        run: the resolved run.
        device: the device that computes.

    Returns:
        The name that the kernel's library gives it.

    Raises:
        NotImplementedError: if the configured backend does not run on this machine.
    """
    attention = run.attention
    if attention.in_baseline is not None:
        name = run.config.engine.name
        return f"{DIFFUSERS if name == CACHE_DIT else name} {attention.in_baseline}"
    return resolved_name(attention.requested, device.type, attention.with_lse, attention.options)


def apply_layout(
    run: ResolvedRun, components: Components, groups: ProcessGroups, backend: str, state: SequenceState
) -> tuple[RunnerFeature | None, StaleKVCache | None]:
    """Shard the network's tokens or blocks over this rank's groups, in place, apart from the runners of its blocks.

    Args:
        run: the resolved run.
        components: the loaded components.
        groups: this rank's groups.
        backend: the attention backend.
        state: the record of how tokens are sharded, which this function fills.

    Returns:
        What shards the arguments of the blocks, or None; and the keys and values that the layout stores between
            evaluations, or None if the layout is exact.

    Raises:
        ValueError: if ring attention cannot use the attention backend.
    """
    layout = run.config.parallel
    if layout.pipe > 1:
        pipeline = PipeFusion(groups.ring, patches_of(layout), layout.warmup)
        pipeline.install(components.network, components.plan, attention_kernel(backend, run.attention.options))
        return pipeline, pipeline
    if groups.tokens.size == 1:
        return None, None
    displaced = DisplacedPatches(groups.ring, layout.warmup) if layout.displaced else None
    ring_kernel = lse_kernel(backend, run.attention.options) if run.attention.with_lse else None
    kernel = attention_kernel(backend, run.attention.options)
    sharding = shard_tokens(
        components.network, components.plan, kernel, ring_kernel, groups, state=state, displaced=displaced
    )
    return sharding, displaced


@dataclass(frozen=True)
class LoadedNetworks:
    """What a rank loads, optimises and shards once; a pipeline of any noise scheduler and cache is built round it.

    Attributes:
        source: the checkpoint's files.
        components: the loaded components.
        optimized: the components to run.
        groups: the groups of ranks that they are sharded over.
        sequence: the record of how tokens are sharded.
        layout: what shards the arguments of the blocks, or None.
        stale_kv: what the layout stores between evaluations, or None if it is exact.
        text: the stage that encodes prompts, with its encoder and its cache of prompts.
        decoding: the stage that decodes.
        decoder: the decoder of that stage.
    """

    source: CheckpointSource
    components: Components
    optimized: OptimizedComponents
    groups: ProcessGroups
    sequence: SequenceState
    layout: RunnerFeature | None
    stale_kv: StaleKVCache | None
    text: Stage
    decoding: Stage
    decoder: Decoder


def load_networks(
    run: ResolvedRun, source: CheckpointSource, groups: ProcessGroups, operators: OperatorCheck
) -> LoadedNetworks:
    """Load the native networks, optimise them, and shard them over this rank's groups.

    Args:
        run: the resolved run.
        source: the checkpoint's files.
        groups: this rank's groups.
        operators: what compares the operators of this rank with float64, while they are whole and on the device.

    Returns:
        The networks.

    Raises:
        CheckpointError: if weights are missing, broken or do not fit.
        ValueError: if settings do not go together.
    """
    config, model = run.config, run.config.model
    load: ComponentLoader = importlib.import_module(ARCHITECTURES[model.architecture].module).load
    backend = run.attention.backend(source.device.type)
    sharder: ShardWeights | None = partial(shard_linears, group=groups.tp) if groups.tp.size > 1 else None
    if config.parallel.pipe > 1:
        sharder = partial(drop_blocks, group=groups.ring)
    devices = dict.fromkeys(components_on_cpu(config, source), torch.device("cpu"))
    components = load(
        replace(source, shard_network=sharder, devices=devices),
        attention_kernel(backend, run.attention.options),
        **own_options(ARCHITECTURES, model.architecture, config.plugin),
    )
    check_size_multiple(model.size_multiple, components.size_multiple)
    if model.quantize is not Quantize.none:
        quantize(components.network, components.plan, model.quantize.name, source)
    dtype = source.dtype_of(source.denoiser)
    components = operators.watch(components)
    optimized = optimize(
        components, config.engine, source.device, dtype, groups.replica.size > 1, replay_support(config, groups)
    )
    operators.compare_operators()
    operators.compare_attention(backend, run.attention.with_lse, components.plan, dtype, run.attention.options)
    state = SequenceState()
    layout, stale_kv = apply_layout(run, components, groups, backend, state)
    if config.parallel.shard_weights:
        apply_fsdp(components.network, components.plan, groups.weights, source.device)
    text = TextEncoding(
        operators.compare_loaded(optimized.load_prompts),
        components.guidance,
        PromptCache(cache_mib(config)),
        model.text.keep_loaded,
    )
    decoding = Decoding(decoder_of(optimized.decoder, groups, config.parallel))
    return LoadedNetworks(
        source,
        components,
        optimized,
        groups,
        state,
        layout,
        stale_kv,
        offloaded(run, text, text.encoder, source.device),
        offloaded(run, decoding, components.decoder, source.device),
        decoding.decoder,
    )


def native_pipeline(run: ResolvedRun, loaded: LoadedNetworks) -> ComposedPipeline:
    """Build the stages round loaded networks, in place of those of an earlier run.

    Args:
        run: the resolved run.
        loaded: the networks of a run with an equal `weights_key` (harness.resolve.engine_key).

    Returns:
        The pipeline. An earlier one of the same networks cannot run any more.

    Raises:
        ValueError: if settings do not go together.
    """
    config, source, components, optimized = run.config, loaded.source, loaded.components, loaded.optimized
    cached = cached_network(
        config.cache, components.network, components.plan, loaded.groups.replica, loaded.sequence, config.plugin
    )
    # from the blocks outwards: each gets its slice of the modulation, a cache skips them, a layout shards their tokens
    unwrap_runners(components.network, components.plan)
    wrap_runners(components.network, components.plan, optimized.precompute, cached, loaded.layout)
    noise_scheduler = noise_scheduler_of(run, source, components)
    with_solver = solver_choice(run, noise_scheduler)
    network = optimized.network if cached is None else cached
    options = DenoisingOptions(
        optimized.precompute,
        guidance_schedule(config.cache, config.plugin),
        cached is not None,
        loaded.stale_kv,
        optimized.notes,
        guidance_rule(config),
        loaded.decoder,
        with_solver,
    )
    dtype = source.dtype_of(source.denoiser)
    denoising = Denoising(network, dtype, noise_scheduler, components.guidance, loaded.groups.cfg, options)
    stages = [
        loaded.text,
        TimestepPreparation(noise_scheduler, components.size_multiple),
        LatentPreparation(components.latent, noise_scheduler),
        offloaded(run, denoising, components.network, source.device),
        loaded.decoding,
    ]
    validation = InputValidation(limits_of(run, components), noise_scheduler, with_solver)
    return ComposedPipeline(validation, with_own_stages(stages, run, components), SyncExecutor())


def guidance_rule(config: RunConfig) -> Combine:
    """Return the configured guidance rule, with its options."""
    name = config.model.guidance_rule
    rule: Combine = imported(GUIDANCE_RULES[name])
    options = own_options(GUIDANCE_RULES, name, config.plugin)
    return partial(rule, **options) if options else rule


def offloaded(run: ResolvedRun, stage: Stage, part: object, device: torch.device) -> Stage:
    """Return a stage whose networks are on the device only while it runs, if model.offload is set; else the stage."""
    return OffloadedStage(stage, networks_in(part), device) if run.config.model.offload else stage


def replay_support(config: RunConfig, groups: ProcessGroups) -> ReplaySupport:
    """Return what can be replayed: what is not sharded, moved to and from the CPU, or skipped by a block cache."""
    here = not (config.model.offload or config.parallel.shard_weights)
    whole = groups.tp.size == groups.tokens.size == 1 and not is_block_cache(config.cache.name)
    return ReplaySupport(network=here and whole, decoder=here and groups.replica.size == 1)


def decoder_of(decoder: Decoder, groups: ProcessGroups, layout: ParallelConfig) -> Decoder:
    """Return the decoder, sharded over the ranks of a replica if there are several.

    Args:
        decoder: the decoder, written for one device; its layers are replaced in place.
        groups: this rank's groups.
        layout: the degrees of parallelism, and what the decoder is sharded by.

    Returns:
        The decoder to call.

    Raises:
        ValueError: if frames are to be sharded, and the decoder is one of images.
    """
    if groups.replica.size == 1:
        return decoder

    from harness.parallel.vae import parallel_decoder  # imports every autoencoder that can be sharded

    return parallel_decoder(decoder, groups.replica, layout.decode)


def components_on_cpu(config: RunConfig, source: CheckpointSource) -> list[str]:
    """Return the names of the components that are loaded to CPU memory, whichever device computes.

    Args:
        config: the resolved configuration.
        source: the checkpoint's files.

    Returns:
        The names.

    Raises:
        NotImplementedError: if model.offload is set and the device has no memory of its own.
    """
    if config.model.offload and source.device.type == "cpu":
        raise NotImplementedError(
            "model.offload=true takes networks from a GPU's memory to the CPU's, and this machine has no GPU"
        )
    return [source.denoiser, *COMPONENTS] if config.model.offload else [source.denoiser] * config.parallel.shard_weights
