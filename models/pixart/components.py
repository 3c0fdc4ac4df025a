"""A full text-to-image checkpoint of PixArt: T5 prompts, the network, and a KL autoencoder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from models.attention import AttentionKernel, sdpa_attention
from models.checkpoint import load_network
from models.checkpoint_source import CheckpointSource
from models.components import Components, GuidanceRule, LatentSpace
from models.configs.pixart import read_config
from models.decoders import load_kl_decoder
from models.pixart.network import PixArt
from models.pixart.weights import NAMES, PLAN, PRECOMPUTE
from models.text.t5 import load_t5_prompts


def load_denoiser(source: CheckpointSource, kernel: AttentionKernel = sdpa_attention, stride: int = 8) -> PixArt:
    """Load the network alone.

    Args:
        source: The checkpoint.
        kernel: The attention kernel of every block.
        stride: The number of image pixels per latent pixel, along a side.

    Returns:
        The network.

    Raises:
        CheckpointError: A configuration that it cannot be built from, or weights that do not fit it.
    """
    config = replace(read_config(source.config_folder(source.denoiser)), stride=stride)
    return load_network(lambda: PixArt(config, kernel), source, source.denoiser, NAMES, PLAN)


def load(source: CheckpointSource, kernel: AttentionKernel) -> Components:
    """Load the components of a checkpoint in the layout of diffusers' PixArtAlphaPipeline and PixArtSigmaPipeline.

    Returns:
        The components.

    Raises:
        CheckpointError: A component that is missing, unreadable or does not fit.
    """
    decoder = load_kl_decoder(source)
    network = load_denoiser(source, kernel, decoder.stride)
    config = network.config
    learned_variance = config.out_channels != config.in_channels
    return Components(
        network=network,
        load_prompts=partial(load_t5_prompts, source, lowercase=True),
        decoder=decoder,
        plan=PLAN,
        precompute=PRECOMPUTE,
        latent=LatentSpace(config.in_channels, decoder.stride),
        size_multiple=decoder.stride * config.patch,
        guidance=GuidanceRule(channels=config.in_channels if learned_variance else None),
        learned_variance=learned_variance,
    )
