"""The sizes of FLUX.1's network, read from its config.json, and the tensors it needs; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.configs.shapes import TensorShapes
from models.files import CheckpointError, check_sizes, read_network_config, rotary_axes

TIME_CHANNELS = 256
PATCH = 2  # a token is PATCH x PATCH latent pixels
CLASS_NAME = "FluxTransformer2DModel"
DEFAULTS: dict[str, Any] = {  # diffusers' defaults of the keys that a config.json omits
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}


@dataclass(frozen=True)
class FluxConfig:
    """The sizes of one network.

    Args:
        depth: The number of double blocks.
        single_depth: The number of single blocks.
        heads: The number of attention heads; the width is heads * head_channels.
        head_channels: The number of channels per head.
        channels: The number of latent channels, in and out.
        text_channels: The number of channels of a prompt embedding.
        pooled_channels: The number of channels of the pooled text vector.
        axes: The channels of a head that the text axis (whose positions are all 0), the row and the column rotate.
        guidance: Whether the network is guidance-distilled, so that it takes the guidance scale as an input.
    """

    depth: int = 19
    single_depth: int = 38
    heads: int = 24
    head_channels: int = 128
    channels: int = 16
    text_channels: int = 4096
    pooled_channels: int = 768
    axes: tuple[int, int, int] = (16, 56, 56)
    guidance: bool = False

    @property
    def width(self) -> int:
        """The number of channels of a token."""
        return self.heads * self.head_channels


def read_config(folder: Path) -> FluxConfig:
    """Read the sizes from a `config.json` of diffusers' `FluxTransformer2DModel`.

    Args:
        folder: The network's folder.

    Returns:
        The sizes.

    Raises:
        CheckpointError: No such file, another class, or an option that this network does not support.
    """
    path, raw = folder / "config.json", read_network_config(folder, (CLASS_NAME,), DEFAULTS)
    raw["out_channels"] = raw["out_channels"] or raw["in_channels"]
    sizes = [name for name in DEFAULTS if name not in ("guidance_embeds", "axes_dims_rope")]
    check_sizes(raw, path, sizes)
    if raw["out_channels"] != raw["in_channels"]:
        raise CheckpointError(
            f"{path}: in_channels is not out_channels, so the network reads more than a noisy latent (an image to "
            "inpaint or to follow); only text-to-image checkpoints load here"
        )
    if raw["patch_size"] != 1 or raw["in_channels"] % PATCH**2:
        raise CheckpointError(
            f"{path}: patch_size={raw['patch_size']}, in_channels={raw['in_channels']}; only latents packed {PATCH} x "
            f"{PATCH} outside of patches of 1 are supported"
        )
    axes = rotary_axes(raw, path, "axes_dims_rope", raw["attention_head_dim"])
    return FluxConfig(
        depth=raw["num_layers"],
        single_depth=raw["num_single_layers"],
        heads=raw["num_attention_heads"],
        head_channels=raw["attention_head_dim"],
        channels=raw["in_channels"] // PATCH**2,
        text_channels=raw["joint_attention_dim"],
        pooled_channels=raw["pooled_projection_dim"],
        axes=axes,
        guidance=bool(raw["guidance_embeds"]),
    )


def tensor_shapes(config: FluxConfig) -> TensorShapes:
    """Return the shape of every tensor of the network, by published name."""
    found, width = TensorShapes(), config.width
    found.linear("x_embedder", PATCH**2 * config.channels, width)
    found.linear("context_embedder", config.text_channels, width)
    found.embedder("time_text_embed.timestep_embedder", TIME_CHANNELS, width)
    found.embedder("time_text_embed.text_embedder", config.pooled_channels, width)
    if config.guidance:
        found.embedder("time_text_embed.guidance_embedder", TIME_CHANNELS, width)
    for block in (f"transformer_blocks.{n}" for n in range(config.depth)):
        found.linear(f"{block}.norm1.linear", width, 6 * width)
        found.linear(f"{block}.norm1_context.linear", width, 6 * width)
        found.joint_attention(f"{block}.attn", width, config.head_channels)
        found.feed_forward(f"{block}.ff", width)
        found.feed_forward(f"{block}.ff_context", width)
    for block in (f"single_transformer_blocks.{n}" for n in range(config.single_depth)):
        found.linear(f"{block}.norm.linear", width, 3 * width)
        found.projections((f"{block}.attn.to_{part}" for part in "qkv"), width)
        found.gains((f"{block}.attn.norm_q", f"{block}.attn.norm_k"), config.head_channels)
        found.linear(f"{block}.proj_mlp", width, 4 * width)
        found.linear(f"{block}.proj_out", 5 * width, width)
    found.linear("norm_out.linear", width, 2 * width)
    found.linear("proj_out", width, PATCH**2 * config.channels)
    return found


def expected(folder: Path) -> TensorShapes:
    """Check the denoiser's config.json in a folder, and return the shapes of its tensors. Raises CheckpointError."""
    return tensor_shapes(read_config(folder))
