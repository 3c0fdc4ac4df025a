"""A full checkpoint of Stable Diffusion 1 or 2: CLIP prompts, the UNet, and a KL autoencoder."""

from __future__ import annotations

from functools import partial

from models.attention import AttentionKernel, sdpa_attention
from models.checkpoint_source import CheckpointSource
from models.components import Components, LatentSpace
from models.decoders import load_kl_decoder
from models.unet.network import ConditionalUNet
from models.unet.prompts import load_clip_prompts
from models.unet.weights import load_conditional


def load_denoiser(source: CheckpointSource, kernel: AttentionKernel = sdpa_attention) -> ConditionalUNet:
    """Load the network alone.

    Returns:
        The network.

    Raises:
        CheckpointError: A configuration that it cannot be built from, or weights that do not fit it.
    """
    return ConditionalUNet(load_conditional(source, kernel, None))


def load(source: CheckpointSource, kernel: AttentionKernel) -> Components:
    """Load the components of a checkpoint in the layout of diffusers' StableDiffusionPipeline.

    Returns:
        The components.

    Raises:
        CheckpointError: A component that is missing, unreadable or does not fit.
    """
    network, decoder = load_denoiser(source, kernel), load_kl_decoder(source)
    return Components(
        network=network,
        load_prompts=partial(load_clip_prompts, source),
        decoder=decoder,
        latent=LatentSpace(decoder.latent_channels, decoder.stride),
        size_multiple=decoder.stride,
    )
