"""A full SDXL base checkpoint: the prompts of two CLIPs, the size-conditioned UNet, and a KL autoencoder."""

from __future__ import annotations

from functools import partial

from models.attention import AttentionKernel, sdpa_attention
from models.checkpoint_source import CheckpointSource
from models.component_rules import check_size_numbers
from models.components import Components, LatentSpace
from models.decoders import load_kl_decoder
from models.files import CheckpointError
from models.unet.network import SizeConditionedUNet
from models.unet.prompts import load_two_clip_prompts
from models.unet.weights import load_conditional


def load_denoiser(source: CheckpointSource, kernel: AttentionKernel = sdpa_attention) -> SizeConditionedUNet:
    """Load the network alone; its stride, for the size conditioning, comes from `vae/config.json`.

    Returns:
        The network.

    Raises:
        CheckpointError: A configuration that it cannot be built from, or weights that do not fit it.
    """
    blocks = source.config("vae").get("block_out_channels")
    if not isinstance(blocks, list):
        raise CheckpointError(f"{source.config_folder('vae') / 'config.json'}: no list under block_out_channels")
    return SizeConditionedUNet(load_conditional(source, kernel, "text_time"), stride=2 ** (len(blocks) - 1))


def load(source: CheckpointSource, kernel: AttentionKernel) -> Components:
    """Load the components of a checkpoint in the layout of diffusers' StableDiffusionXLPipeline.

    Returns:
        The components.

    Raises:
        CheckpointError: A component that is missing, unreadable or does not fit; a refiner.
    """
    check_size_numbers(source, "unet")
    network = load_denoiser(source, kernel)
    decoder = load_kl_decoder(source)
    return Components(
        network=network,
        load_prompts=partial(load_two_clip_prompts, source),
        decoder=decoder,
        latent=LatentSpace(decoder.latent_channels, decoder.stride),
        size_multiple=decoder.stride,
    )
