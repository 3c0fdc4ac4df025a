"""Latents to pixels through Qwen-Image's video autoencoder, for which an image is one frame."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from torch import Tensor

from models.checkpoint_source import CheckpointSource
from models.decoders import load_from_diffusers


class QwenImageDecoder:
    """The decoder half of an AutoencoderKLQwenImage, after inverting the latent's mean and deviation per channel.

    Source: Qwen-Image (arXiv:2508.02324, section 2.2), in diffusers' convention: decode(z * std + mean).
    """

    def __init__(self, vae: AutoencoderKLQwenImage) -> None:
        self.vae = vae
        self.latent_channels = int(vae.config.z_dim)
        self.stride = int(vae.spatial_compression_ratio)

    def __call__(self, latent_BCHW: Tensor) -> Tensor:
        """Return pixels (B, 3, stride * H, stride * W), float32 in [0, 1]."""
        z_BCHW = latent_BCHW * self._by_channel(self.vae.config.latents_std, latent_BCHW)
        z_BCHW = z_BCHW + self._by_channel(self.vae.config.latents_mean, latent_BCHW)
        frames = self.vae.decode(z_BCHW.unsqueeze(2).to(self.vae.dtype), return_dict=False)[0]
        pixels: Tensor = frames[:, :, 0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    @staticmethod
    def _by_channel(values: list[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def load_qwen_image_decoder(source: CheckpointSource) -> QwenImageDecoder:
    """Load the decoder of a checkpoint with `vae/`.

    Returns:
        The decoder.

    Raises:
        CheckpointError: Files that diffusers cannot read.
    """
    return QwenImageDecoder(load_from_diffusers(source, "vae", AutoencoderKLQwenImage))
