"""A full class-conditional checkpoint of DiT: class labels, the network, and a KL autoencoder."""

from __future__ import annotations

from models.attention import AttentionKernel, sdpa_attention
from models.checkpoint import load_network
from models.checkpoint_source import CheckpointSource
from models.components import Components, GuidanceRule, LatentSpace
from models.configs.dit import read_config
from models.decoders import load_kl_decoder
from models.dit.network import DiT
from models.dit.prompts import ClassLabels
from models.dit.weights import NAMES, PLAN, PRECOMPUTE
from models.prompt_rules import read_names


def load_denoiser(source: CheckpointSource, kernel: AttentionKernel = sdpa_attention) -> DiT:
    """Load the network alone.

    Returns:
        The network.

    Raises:
        CheckpointError: A configuration that it cannot be built from, or weights that do not fit it.
    """
    config = read_config(source.config_folder(source.denoiser))
    return load_network(lambda: DiT(config, kernel), source, source.denoiser, NAMES, PLAN)


def load(source: CheckpointSource, kernel: AttentionKernel) -> Components:
    """Load the components of a checkpoint in the layout of diffusers' DiTPipeline.

    Returns:
        The components.

    Raises:
        CheckpointError: A component that is missing, unreadable or does not fit.
    """
    network, decoder = load_denoiser(source, kernel), load_kl_decoder(source)
    config = network.config
    labels = ClassLabels(read_names(source.index()), config.classes, source.device)
    return Components(
        network=network,
        load_prompts=lambda: labels,
        decoder=decoder,
        plan=PLAN,
        precompute=PRECOMPUTE,
        latent=LatentSpace(config.in_channels, decoder.stride),
        size_multiple=decoder.stride * config.patch,
        guidance=GuidanceRule(channels=config.in_channels),
        check_prompt=labels.check,
        learned_variance=config.out_channels != config.in_channels,
    )
