"""Latent decoders, through diffusers' autoencoders, from a folder on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from models.checkpoint import refuse_misfits
from models.files import CheckpointError


class KLDecoder:
    """The decoder half of an AutoencoderKL, with the checkpoint's own scale and shift undone first.

    Source: latent diffusion (Rombach et al. 2022), in diffusers' convention: decode(z / scaling_factor + shift_factor).
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self.latent_channels = int(vae.config.latent_channels)
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)

    def __call__(self, latent_BCHW: Tensor) -> Tensor:
        """Pixels (B, 3, stride * H, stride * W), float32 in [0, 1]."""
        z_BCHW = latent_BCHW / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        pixels: Tensor = self.vae.decode(z_BCHW.to(self.vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


def load_kl_decoder(folder: Path, dtype: torch.dtype, device: torch.device, dummy: bool = False) -> KLDecoder:
    """The decoder of a checkpoint in the diffusers layout (`vae/`).

    Raises:
        CheckpointError: files that diffusers cannot read.
    """
    try:
        if dummy:
            config = AutoencoderKL.load_config(folder / "vae", local_files_only=True)
            vae = nn.Module.to(AutoencoderKL.from_config(config), dtype)
        else:
            vae, found = AutoencoderKL.from_pretrained(
                folder / "vae",
                local_files_only=True,
                use_safetensors=True,
                torch_dtype=dtype,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
            refuse_misfits(found, folder / "vae")
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the VAE cannot be read ({str(error).splitlines()[0]})") from error
    return KLDecoder(vae.to(device).eval())
