"""A whole text-to-image checkpoint around the DiT: T5 text encoder, the network, and a KL autoencoder."""

from __future__ import annotations

from pathlib import Path

import torch

from models.attention import AttentionKernel
from models.components import Components
from models.dit.network import DiT
from models.dit.weights import load_dit, read_config
from models.text import load_t5
from models.vae import load_kl_decoder

DUMMY_SEED = 0


def load(
    folder: Path,
    denoiser: str,
    kernel: AttentionKernel,
    dtype: torch.dtype,
    device: torch.device,
    text_tokens: int,
    dummy: bool,
) -> Components:
    """The components of a checkpoint in the layout of diffusers' PixArtSigmaPipeline.

    The decoder is kept in float32: it is small, and its error would be counted against every method alike.

    Args:
        folder: the checkpoint.
        denoiser: the network's folder in it, `transformer` in diffusers' own layout.
        kernel: the attention of the network.
        dtype: of the network and the text encoder.
        device: where they live.
        text_tokens: tokens a prompt is padded or cut to.
        dummy: random weights (fixed seed) of the architecture that the folder's configs describe.

    Raises:
        CheckpointError: a component that is missing, unreadable or does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DUMMY_SEED)
        text = load_t5(folder, dtype, device, text_tokens, dummy)
        decoder = load_kl_decoder(folder, torch.float32, device, dummy)
        if dummy:
            network = DiT(read_config(folder / denoiser), kernel).to(device=device, dtype=dtype).eval()
        else:
            network = load_dit(folder / denoiser, kernel, dtype, device)
    multiple = decoder.stride * network.config.patch
    return Components(network, text, decoder, decoder.latent_channels, decoder.stride, multiple)
