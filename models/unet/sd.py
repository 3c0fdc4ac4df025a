"""A whole Stable Diffusion checkpoint of the first or second generation: CLIP prompts, the UNet, a KL autoencoder."""

from __future__ import annotations

from functools import partial

from models.attention import AttentionKernel, sdpa_attention
from models.components import Components, LatentSpace
from models.decoders import load_kl_decoder
from models.source import Source
from models.unet.network import ConditionalUNet
from models.unet.prompts import load_clip_prompts
from models.unet.weights import load_conditional


def load_denoiser(source: Source, kernel: AttentionKernel = sdpa_attention) -> ConditionalUNet:
    """The network alone.

    Raises:
        CheckpointError: a configuration that it cannot be built from, or weights that do not fit it.
    """
    return ConditionalUNet(load_conditional(source, kernel, None))


def load(source: Source, kernel: AttentionKernel) -> Components:
    """The components of a checkpoint in the layout of diffusers' StableDiffusionPipeline.

    Raises:
        CheckpointError: a component that is missing, unreadable or does not fit.
    """
    network, decoder = load_denoiser(source, kernel), load_kl_decoder(source)
    return Components(
        network=network,
        load_prompts=partial(load_clip_prompts, source),
        decoder=decoder,
        latent=LatentSpace(decoder.latent_channels, decoder.stride),
        size_multiple=decoder.stride,
    )
