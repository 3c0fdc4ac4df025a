"""Video latents to frames, through diffusers' AutoencoderKLWan."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from models.checkpoint_source import CheckpointSource
from models.components import LatentSpace
from models.decoders import load_from_diffusers


class WanDecoder:
    """The decoder half of an AutoencoderKLWan, after inverting each latent channel's mean and deviation.

    Source: Wan-VAE (arXiv:2503.20314, section 4.1), in diffusers' convention: decode(z * latents_std + latents_mean).
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        self.space = LatentSpace(
            int(vae.config.z_dim), int(vae.config.scale_factor_spatial), int(vae.config.scale_factor_temporal)
        )

    def __call__(self, latent_BCFHW: Tensor) -> Tensor:
        """Return frames (B, frames, 3, stride * H, stride * W), float32 in [0, 1]."""
        return self.pixels(self.vae.decode(self.denormalize(latent_BCFHW), return_dict=False)[0])

    def denormalize(self, latent_BCFHW: Tensor) -> Tensor:
        """Return the input of the autoencoder's decoder, in its dtype."""
        mean, std = (
            torch.tensor(values, device=latent_BCFHW.device)[:, None, None, None]
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return (latent_BCFHW * std + mean).to(self.vae.dtype)

    @staticmethod
    def pixels(video_BCFHW: Tensor) -> Tensor:
        """Return frames (B, F, C, H, W), float32 in [0, 1], of the autoencoder's output in about [-1, 1]."""
        return (video_BCFHW.transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)


def load_wan_decoder(source: CheckpointSource) -> WanDecoder:
    """Load the decoder of a checkpoint with `vae/`.

    Returns:
        The decoder.

    Raises:
        CheckpointError: Files that diffusers cannot read.
    """
    return WanDecoder(load_from_diffusers(source, "vae", AutoencoderKLWan))
