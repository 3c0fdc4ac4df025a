"""The sizes of PixArt's network, read from its config.json, and the tensors it needs; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.configs.shapes import TensorShapes
from models.files import CheckpointError, check_numbers, check_options, check_sizes, read_network_config

TIME_CHANNELS = 256
CLASS_NAME = "PixArtTransformer2DModel"
CLASSES = (CLASS_NAME, "Transformer2DModel")  # older files have the second, which diffusers reads as the first
SIZES = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "patch_size",
    "sample_size",
    "caption_channels",
)
ONLY = {
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "upcast_attention": False,
}
SIZE_CONDITIONING_SAMPLE_SIZE = 128  # a config.json without use_additional_conditions means true at this sample size


@dataclass(frozen=True)
class PixArtConfig:
    """The sizes of one network.

    Args:
        depth: The number of transformer blocks.
        heads: The number of attention heads; the width is heads * head_channels.
        head_channels: The number of channels per head.
        in_channels: The number of latent channels.
        out_channels: The number of output channels, twice the latent channels with a learned variance.
        patch: The side of a patch, in latent pixels.
        sample_size: The side of the training latent, in latent pixels; positions are relative to it.
        text_channels: The number of channels of a prompt embedding.
        position_scale: The divisor of the positions (diffusers' interpolation_scale; 2 for PixArt's 1024-pixel
            checkpoints).
        size_conditioning: Whether the image's height, width and aspect ratio are embedded with the time (PixArt-alpha's
            1024-pixel checkpoints; diffusers' use_additional_conditions).
        stride: The number of image pixels per latent pixel along a side, for the size conditioning.
        norm_eps: The epsilon of the norms in the blocks.
    """

    depth: int = 6
    heads: int = 8
    head_channels: int = 32
    in_channels: int = 4
    out_channels: int = 4
    patch: int = 2
    sample_size: int = 16
    text_channels: int = 256
    position_scale: float = 1.0
    size_conditioning: bool = False
    stride: int = 8
    norm_eps: float = 1e-6

    @property
    def width(self) -> int:
        """The number of channels of a token."""
        return self.heads * self.head_channels


def read_config(folder: Path) -> PixArtConfig:
    """Read the sizes from a `config.json` of diffusers' `PixArtTransformer2DModel`, or of its former class.

    Args:
        folder: The network's folder.

    Returns:
        The sizes.

    Raises:
        CheckpointError: No such file, another class, or an option that this network does not support.
    """
    path, raw = folder / "config.json", read_network_config(folder, CLASSES, {})
    if raw["_class_name"] != CLASS_NAME and "norm_type" not in raw:
        raise CheckpointError(f"{path}: no norm_type, which says what kind of {raw['_class_name']} this is")
    check_sizes(raw, path, SIZES)
    check_numbers(
        raw, path, ("norm_eps",) if raw.get("interpolation_scale") is None else ("norm_eps", "interpolation_scale")
    )
    config = PixArtConfig(
        depth=raw["num_layers"],
        heads=raw["num_attention_heads"],
        head_channels=raw["attention_head_dim"],
        in_channels=raw["in_channels"],
        out_channels=raw["out_channels"],
        patch=raw["patch_size"],
        sample_size=raw["sample_size"],
        text_channels=raw["caption_channels"],
        position_scale=float(raw.get("interpolation_scale") or max(raw["sample_size"] // 64, 1)),
        size_conditioning=_has_size_conditioning(raw),
        norm_eps=float(raw.get("norm_eps", 1e-6)),
    )
    check_options(raw, path, ONLY | {"cross_attention_dim": config.width})
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise CheckpointError(f"{path}: out_channels={config.out_channels}; a network outputs in_channels, or twice it")
    if config.size_conditioning and config.width % 3:
        raise CheckpointError(f"{path}: use_additional_conditions needs a width that 3 divides, not {config.width}")
    return config


def _has_size_conditioning(raw: dict[str, Any]) -> bool:
    stated = raw.get("use_additional_conditions")
    return raw["sample_size"] == SIZE_CONDITIONING_SAMPLE_SIZE if stated is None else bool(stated)


def config_json(config: PixArtConfig) -> dict[str, Any]:
    """Return the `config.json` from which diffusers builds the same network."""
    return {
        "_class_name": CLASS_NAME,
        "num_layers": config.depth,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_channels,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "patch_size": config.patch,
        "sample_size": config.sample_size,
        "caption_channels": config.text_channels,
        "interpolation_scale": config.position_scale,
        "cross_attention_dim": config.width,
        "norm_type": "ada_norm_single",
        "norm_eps": config.norm_eps,
        "use_additional_conditions": config.size_conditioning,
    }


def tensor_shapes(config: PixArtConfig) -> TensorShapes:
    """Return the shape of every tensor of the network, by published name."""
    found, width, third = TensorShapes(), config.width, config.width // 3
    found.conv("pos_embed.proj", config.in_channels, width, config.patch, config.patch)
    found.embedder("adaln_single.emb.timestep_embedder", TIME_CHANNELS, width)
    if config.size_conditioning:
        found.embedder("adaln_single.emb.resolution_embedder", TIME_CHANNELS, third)
        found.embedder("adaln_single.emb.aspect_ratio_embedder", TIME_CHANNELS, third)
    found.linear("adaln_single.linear", width, 6 * width)
    found.embedder("caption_projection", config.text_channels, width)
    for block in (f"transformer_blocks.{n}" for n in range(config.depth)):
        found[f"{block}.scale_shift_table"] = (6, width)
        found.attention(f"{block}.attn1", width)
        found.attention(f"{block}.attn2", width)
        found.feed_forward(f"{block}.ff", width)
    found["scale_shift_table"] = (2, width)
    found.linear("proj_out", width, config.patch**2 * config.out_channels)
    return found


def expected(folder: Path) -> TensorShapes:
    """Check the denoiser's config.json in a folder, and return the shapes of its tensors. Raises CheckpointError."""
    return tensor_shapes(read_config(folder))
