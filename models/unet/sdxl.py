"""A whole SDXL base checkpoint: the prompts of two CLIPs, the UNet told the picture's size, and a KL autoencoder."""

from __future__ import annotations

from functools import partial

from models.attention import AttentionKernel, sdpa_attention
from models.components import Components, LatentSpace
from models.decoders import load_kl_decoder
from models.files import CheckpointError
from models.source import Source
from models.unet.network import SizedUNet
from models.unet.prompts import load_two_clip_prompts
from models.unet.weights import load_conditional


def load_denoiser(source: Source, kernel: AttentionKernel = sdpa_attention) -> SizedUNet:
    """The network alone; the pixels that it tells itself of are counted by the stride that `vae/config.json` has.

    Raises:
        CheckpointError: a configuration that it cannot be built from, or weights that do not fit it.
    """
    blocks = source.config("vae").get("block_out_channels")
    if not isinstance(blocks, list):
        raise CheckpointError(f"{source.config_folder('vae') / 'config.json'}: no list under block_out_channels")
    return SizedUNet(load_conditional(source, kernel, "text_time"), stride=2 ** (len(blocks) - 1))


def load(source: Source, kernel: AttentionKernel) -> Components:
    """The components of a checkpoint in the layout of diffusers' StableDiffusionXLPipeline.

    Raises:
        CheckpointError: a component that is missing, unreadable or does not fit; a refiner.
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


def _check_sizes(source: Source, network: SizedUNet) -> None:
    """Refuses a network that is told other numbers than six of the size, as the refiner is (aesthetic scores)."""
    config, pooled = network.unet.config, source.config("text_encoder_2").get("projection_dim")
    wanted, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    if not isinstance(pooled, int) or wanted != 6 * each + pooled:
        raise CheckpointError(
            f"{source.folder}: the network is told {wanted} numbers beside the time, where six of the size with {each} "
            f"each and a pooled vector of {pooled} are given; the refiner is not supported"
        )
