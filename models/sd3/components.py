"""A full checkpoint of Stable Diffusion 3 or 3.5: CLIP and T5 prompts, the network, and a KL autoencoder."""

from __future__ import annotations

from functools import partial

from models.attention import AttentionKernel, sdpa_attention
from models.checkpoint import load_network
from models.checkpoint_source import CheckpointSource
from models.components import Components, LatentSpace
from models.configs.sd3 import read_config
from models.decoders import load_kl_decoder
from models.sd3.network import SD3
from models.sd3.prompts import load_sd3_prompts
from models.sd3.weights import NAMES, PLAN, PRECOMPUTE


def load_denoiser(source: CheckpointSource, kernel: AttentionKernel = sdpa_attention) -> SD3:
    """Load the network alone.

    Returns:
        The network.

    Raises:
        CheckpointError: A configuration that it cannot be built from, or weights that do not fit it.
    """
    config = read_config(source.config_folder(source.denoiser))
    return load_network(lambda: SD3(config, kernel), source, source.denoiser, NAMES, PLAN)


def load(source: CheckpointSource, kernel: AttentionKernel) -> Components:
    """Load the components of a checkpoint in the layout of diffusers' StableDiffusion3Pipeline.

    Returns:
        The components.

    Raises:
        CheckpointError: A component that is missing, unreadable or does not fit.
    """
    network, decoder = load_denoiser(source, kernel), load_kl_decoder(source)
    token = decoder.stride * network.config.patch
    return Components(
        network=network,
        load_prompts=partial(load_sd3_prompts, source, network.config.text_channels),
        decoder=decoder,
        plan=PLAN,
        precompute=PRECOMPUTE,
        latent=LatentSpace(decoder.latent_channels, decoder.stride),
        size_multiple=token,
        max_side=token * network.config.max_positions,
    )
