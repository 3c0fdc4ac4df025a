"""A full SDXL base checkpoint: the prompts of two CLIPs, the size-conditioned UNet, and a KL autoencoder."""

from __future__ import annotations

from functools import partial

from models.attention import AttentionKernel, sdpa_attention
from models.checkpoint_source import CheckpointSource
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
    network = load_denoiser(source, kernel)
    _check_sizes(source, network)
    decoder = load_kl_decoder(source)
    return Components(
        network=network,
        load_prompts=partial(load_two_clip_prompts, source),
        decoder=decoder,
        latent=LatentSpace(decoder.latent_channels, decoder.stride),
        size_multiple=decoder.stride,
    )


def _check_sizes(source: CheckpointSource, network: SizeConditionedUNet) -> None:
    """Raise an error unless the network takes six size numbers; the refiner takes others (aesthetic scores)."""
    config, pooled = network.unet.config, source.config("text_encoder_2").get("projection_dim")
    expected, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    if not isinstance(pooled, int) or expected != 6 * each + pooled:
        raise CheckpointError(
            f"{source.folder}: the network takes {expected} conditioning channels, but six size numbers of {each} "
            f"channels each and a pooled vector of {pooled} are available; the refiner is not supported"
        )
