"""A full checkpoint of FLUX.1: CLIP and T5 prompts, the network, and a KL autoencoder."""

from __future__ import annotations

from functools import partial

from models.attention import AttentionKernel, sdpa_attention
from models.checkpoint import load_network
from models.checkpoint_source import CheckpointSource
from models.components import Components, GuidanceRule, LatentSpace
from models.configs.flux import PATCH, read_config
from models.decoders import load_kl_decoder
from models.flux.network import Flux
from models.flux.prompts import load_flux_prompts
from models.flux.weights import NAMES, PLAN, PRECOMPUTE


def load_denoiser(source: CheckpointSource, kernel: AttentionKernel = sdpa_attention) -> Flux:
    """Load the network alone.

    Returns:
        The network.

    Raises:
        CheckpointError: A configuration that it cannot be built from, or weights that do not fit it.
    """
    config = read_config(source.config_folder(source.denoiser))
    return load_network(lambda: Flux(config, kernel), source, source.denoiser, NAMES, PLAN)


def load(source: CheckpointSource, kernel: AttentionKernel) -> Components:
    """Load the components of a checkpoint in the layout of diffusers' FluxPipeline.

    Returns:
        The components.

    Raises:
        CheckpointError: A component that is missing, unreadable or does not fit.
    """
    network, decoder = load_denoiser(source, kernel), load_kl_decoder(source)
    return Components(
        network=network,
        load_prompts=partial(load_flux_prompts, source),
        decoder=decoder,
        plan=PLAN,
        precompute=PRECOMPUTE,
        latent=LatentSpace(decoder.latent_channels, decoder.stride),
        size_multiple=decoder.stride * PATCH,
        guidance=GuidanceRule(embedded=network.config.guidance),
        even_sigmas=True,
    )
