"""A full text-to-image checkpoint of Qwen-Image: Qwen2.5-VL prompts, the network, and its video autoencoder."""

from __future__ import annotations

from functools import partial

from models.attention import AttentionKernel, sdpa_attention
from models.checkpoint import load_network
from models.checkpoint_source import CheckpointSource
from models.components import Components, GuidanceRule, LatentSpace
from models.configs.qwen_image import PATCH, read_config
from models.qwen_image.decoder import load_qwen_image_decoder
from models.qwen_image.network import QwenImage
from models.qwen_image.prompts import load_qwen_image_prompts
from models.qwen_image.weights import NAMES, PLAN, PRECOMPUTE


def load_denoiser(source: CheckpointSource, kernel: AttentionKernel = sdpa_attention) -> QwenImage:
    """Load the network alone.

    Returns:
        The network.

    Raises:
        CheckpointError: A configuration that it cannot be built from, or weights that do not fit it.
    """
    config = read_config(source.config_folder(source.denoiser))
    return load_network(lambda: QwenImage(config, kernel), source, source.denoiser, NAMES, PLAN)


def load(source: CheckpointSource, kernel: AttentionKernel) -> Components:
    """Load the components of a checkpoint in the layout of diffusers' QwenImagePipeline.

    Returns:
        The components.

    Raises:
        CheckpointError: A component that is missing, unreadable or does not fit.
    """
    network, decoder = load_denoiser(source, kernel), load_qwen_image_decoder(source)
    return Components(
        network=network,
        load_prompts=partial(load_qwen_image_prompts, source),
        decoder=decoder,
        plan=PLAN,
        precompute=PRECOMPUTE,
        latent=LatentSpace(decoder.latent_channels, decoder.stride),
        size_multiple=decoder.stride * PATCH,
        guidance=GuidanceRule(token_norm=PATCH),
        even_sigmas=True,
    )
