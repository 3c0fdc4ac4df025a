"""A full text-to-video checkpoint of Wan: UMT5 prompts, the network, and Wan's video autoencoder."""

from __future__ import annotations

from functools import partial

from models.attention import AttentionKernel, sdpa_attention
from models.checkpoint import load_network
from models.checkpoint_source import CheckpointSource
from models.component_rules import check_latent_channels, check_wan_pipeline
from models.components import Components
from models.configs.wan import read_config
from models.wan.decoder import load_wan_decoder
from models.wan.network import Wan
from models.wan.prompts import load_umt5_prompts
from models.wan.weights import KEEP_FLOAT32, NAMES, PLAN, PRECOMPUTE


def load_denoiser(source: CheckpointSource, kernel: AttentionKernel = sdpa_attention) -> Wan:
    """Load the network alone.

    Returns:
        The network.

    Raises:
        CheckpointError: A configuration that it cannot be built from, or weights that do not fit it.
    """
    config = read_config(source.config_folder(source.denoiser))
    return load_network(lambda: Wan(config, kernel), source, source.denoiser, NAMES, PLAN, KEEP_FLOAT32)


def load(source: CheckpointSource, kernel: AttentionKernel) -> Components:
    """Load the components of a checkpoint in the layout of diffusers' WanPipeline.

    Returns:
        The components.

    Raises:
        CheckpointError: A component that is missing, unreadable or does not fit, or a Wan 2.2 pipeline with two
            networks or one timestep per token.
    """
    check_wan_pipeline(source)
    check_latent_channels("wan", source, "transformer")
    network, decoder = load_denoiser(source, kernel), load_wan_decoder(source)
    token = decoder.space.stride * network.config.patch
    return Components(
        network=network,
        load_prompts=partial(load_umt5_prompts, source),
        decoder=decoder,
        plan=PLAN,
        precompute=PRECOMPUTE,
        latent=decoder.space,
        size_multiple=token,
        max_side=token * network.config.max_positions,
    )
