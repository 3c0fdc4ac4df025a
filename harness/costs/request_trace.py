"""A request's denoiser, decoder and text encoders on the meta device: every shape, and no data.

Only configurations are read (and a tokenizer, if the checkpoint has one), so a 14 B model takes seconds and no memory.
Each network is traced once; harness.costs.roofline predicts every layout from the trace.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.build.common import source_of
from harness.config.schema import Decode, RunConfig
from harness.costs.frames_traffic import frames_bytes, trace_frames
from harness.costs.memory import WeightBytes, decode_elements, network_weights
from harness.costs.traffic import GatheredWeights, NetworkTrace, gathered_weights, trace_network
from harness.costs.vae_traffic import decode_bytes, trace_decode
from harness.device.device import denoiser_dtype, torch_dtype
from harness.parallel.vae import RowShardableDecoder
from harness.plugins.options import own_options
from harness.resolve.checkpoint import COMPONENTS
from harness.resolve.request import to_message
from harness.resolve.run import ResolvedRun
from models.attention import attention_kernel
from models.checkpoint_source import CheckpointSource
from models.components import ComponentLoader, Components, Conditioning
from models.plan import ParallelPlan
from models.registry import ARCHITECTURES
from models.wan.decoder import WanDecoder

META = torch.device("meta")


@dataclass(frozen=True)
class RequestTrace:
    """The traces and sizes that every layout of one request shares.

    Args:
        both_branches: one evaluation of a micro-batch with both branches of guidance.
        one_branch: the same with one branch, for ranks that compute one each; None without guidance.
        weights: the denoiser's weights.
        other_weights: the bytes of text encoders and decoder, replicated on every rank.
        itemsize: the bytes per element of the denoiser's dtype.
        latent_bytes: the bytes of the micro-batch's state in float32.
        decode_bytes: the bytes that decoding the micro-batch on one rank holds at its peak.
        gathered: the weights that parallel.shard_weights gathers.
        plan: the parallel plan of the network's family.
    """

    both_branches: NetworkTrace
    one_branch: NetworkTrace | None
    weights: WeightBytes
    other_weights: int
    itemsize: int
    latent_bytes: int
    decode_bytes: int
    gathered: GatheredWeights
    plan: ParallelPlan


class _ScalarsAreTrue(TorchDispatchMode):
    """Answers with true or 1 when a text encoder reads a value of a meta tensor (such as: is every token real?).

    A text encoder uses the answer only to choose a shorter way to the same shapes.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype is torch.bool else 1
        return func(*args, **(kwargs or {}))


def trace_request(run: ResolvedRun) -> RequestTrace:
    """Build and trace the first micro-batch of a request.

    Args:
        run: the resolved run.

    Returns:
        The traces and sizes.

    Raises:
        CheckpointError: a configuration that no network can be built from.
    """
    config, source = run.config, source_of(run, META)
    parts = _components(config, source)
    prompts, negatives = encode_prompts(config, parts)
    guided = to_message(config.request).guidance != 1 and not parts.guidance.embedded
    dtype = torch_dtype(denoiser_dtype(config.model))
    latent = _latent(config, parts)
    weights = network_weights(parts.network, parts.plan)

    def trace_conditions(conditions: Sequence[Conditioning]) -> NetworkTrace:
        condition = Conditioning.stack(conditions)
        if parts.guidance.embedded:
            condition = replace(condition, scale=torch.empty(len(conditions), device=META))
        x = torch.empty(len(conditions), *latent, dtype=dtype, device=META)
        tau_B = torch.empty(len(conditions), device=META)
        return trace_network(lambda: parts.network, parts.plan, (x, tau_B, condition.to(dtype)))

    both_branches = trace_conditions([*negatives, *prompts] if guided else prompts)
    loaded = source.loaded.values()
    return RequestTrace(
        both_branches=both_branches,
        one_branch=trace_conditions(prompts) if guided else None,
        weights=weights,
        other_weights=sum(part.bytes for part in loaded if part.component in resident_components(config)),
        itemsize=dtype.itemsize,
        latent_bytes=4 * len(prompts) * torch.Size(latent).numel(),
        decode_bytes=_decode_bytes(parts, (len(prompts), *latent)),
        gathered=gathered_weights(parts.network, parts.plan),
        plan=parts.plan,
    )


def decode_traffic(run: ResolvedRun) -> list[dict[str, int]]:
    """Return what each rank of a replica sends to decode the first micro-batch, in bytes by kind of collective.

    Args:
        run: the resolved run, with the layout.

    Raises:
        CheckpointError: a configuration that no decoder can be built from.
    """
    config, ranks = run.config, run.replica_size
    parts = _components(config, source_of(run, META))
    decoder = parts.decoder
    if ranks == 1 or not isinstance(decoder, RowShardableDecoder):
        return [{}] * ranks
    itemsize = decoder.vae.dtype.itemsize
    latent = torch.empty(len(_first_prompts(config)), *_latent(config, parts), device=META)
    if config.parallel.decode is Decode.frames and isinstance(decoder, WanDecoder):
        by_frames = trace_frames(lambda: decoder, latent)
        return [frames_bytes(by_frames, ranks, index, itemsize) for index in range(ranks)]
    by_rows = trace_decode(lambda: decoder, latent)
    return [decode_bytes(by_rows, ranks, index, itemsize) for index in range(ranks)]


def encode_prompts(config: RunConfig, parts: Components) -> tuple[list[Conditioning], list[Conditioning]]:
    """Return the conditioning of the first micro-batch's prompts, and of its negative prompts."""
    request, prompts = to_message(config.request), _first_prompts(config)
    with _ScalarsAreTrue(), torch.no_grad():
        encode = parts.load_prompts()
        encoded = {prompt: encode([prompt]) for prompt in prompts}
        negative = encode([request.negative_prompt], negative=True) if parts.guidance.possible else Conditioning()
    return [encoded[prompt] for prompt in prompts], [negative] * len(prompts)


def resident_components(config: RunConfig) -> list[str]:
    """Return the components that stay in memory beside the denoiser while it works."""
    return [name for name in COMPONENTS if config.model.text.keep_loaded or not name.startswith("text_encoder")]


def _components(config: RunConfig, source: CheckpointSource) -> Components:
    load: ComponentLoader = importlib.import_module(ARCHITECTURES[config.model.architecture].module).load
    return load(
        source, attention_kernel("math"), **own_options(ARCHITECTURES, config.model.architecture, config.plugin)
    )


def _first_prompts(config: RunConfig) -> list[str]:
    """Return the prompts of the first micro-batch."""
    request = to_message(config.request)
    return [prompt for prompt in request.prompts for _ in range(request.samples_per_prompt)][: request.batch_size]


def _latent(config: RunConfig, parts: Components) -> tuple[int, ...]:
    request = to_message(config.request)
    return parts.latent.shape(request.height, request.width, request.frames)


def _decode_bytes(parts: Components, latents: tuple[int, ...]) -> int:
    """Return 0 if the state is the image itself."""
    if not isinstance(parts.decoder, RowShardableDecoder):
        return 0
    vae = parts.decoder.vae
    return vae.dtype.itemsize * decode_elements(parts.decoder, vae.decoder, torch.empty(*latents, device=META))
