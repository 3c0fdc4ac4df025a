"""Latent decoders, through diffusers' autoencoders, from a folder on disk."""

from __future__ import annotations

import time
from typing import TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from models.checkpoint import load_weights
from models.checkpoint_source import CheckpointSource
from models.files import CheckpointError
from models.layers import cached_tensor
from models.meta_init import build_empty
from models.names import LEGACY_NAMES

M = TypeVar("M", bound=ModelMixin)


class KLDecoder:
    """The decoder half of an AutoencoderKL, after inverting the checkpoint's scale and shift of the latent.

    Source: latent diffusion (Rombach et al. 2022), in diffusers' convention: decode(z / scaling_factor + shift_factor).
    If the autoencoder has statistics per channel, it is decode(z * latents_std / scaling_factor + latents_mean).
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self.latent_channels = int(vae.config.latent_channels)
        self.stride = 2 ** (len(vae.config.block_out_channels) - 1)

    def __call__(self, latent_BCHW: Tensor) -> Tensor:
        """Return pixels (B, 3, stride * H, stride * W), float32 in [0, 1]."""
        config = self.vae.config
        z_BCHW = latent_BCHW / config.scaling_factor + (config.shift_factor or 0.0)
        if config.latents_mean is not None and config.latents_std is not None:
            device, dtype = latent_BCHW.device, latent_BCHW.dtype
            mean, std = (
                per_channel(tuple(values), dtype, device) for values in (config.latents_mean, config.latents_std)
            )
            z_BCHW = latent_BCHW * std / config.scaling_factor + mean
        pixels: Tensor = self.vae.decode(z_BCHW.to(self.vae.dtype), return_dict=False)[0]
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


@cached_tensor
def per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return one number per channel, (C, 1, 1)."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def load_kl_decoder(source: CheckpointSource) -> KLDecoder:
    """Load the decoder of a checkpoint with `vae/`.

    Returns:
        The decoder.

    Raises:
        CheckpointError: Files that diffusers cannot read.
    """
    return KLDecoder(load_from_diffusers(source, "vae", AutoencoderKL))


def load_from_diffusers(source: CheckpointSource, component: str, model_class: type[M]) -> M:
    """Load a diffusers model in its dtype, on its device, in evaluation mode.

    Args:
        source: The checkpoint.
        component: The model's folder in the checkpoint.
        model_class: The model's class.

    Returns:
        The model, without gradients.

    Raises:
        CheckpointError: A configuration that diffusers cannot build, or weights that do not fit it.
    """
    folder, started = source.config_folder(component), time.perf_counter()
    if (name := source.config(component).get("_class_name", model_class.__name__)) != model_class.__name__:
        raise CheckpointError(
            f"{folder}: config.json says _class_name={name}; {component} is a {model_class.__name__} here"
        )
    try:
        config = model_class.load_config(folder, local_files_only=True)
        model = build_empty(
            lambda: model_class.from_config(config), source.dtype_of(component), source.device_of(component)
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: {component} cannot be built from its config.json ({line})") from error
    load_weights(model, source, component, LEGACY_NAMES, started)
    return model.requires_grad_(False).eval()
