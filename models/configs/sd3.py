"""The sizes of Stable Diffusion 3's network, read from its config.json, and the tensors it needs; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.configs.shapes import TensorShapes
from models.files import CheckpointError, check_lists, check_sizes, read_network_config

TIME_CHANNELS = 256
CLASS_NAME = "SD3Transformer2DModel"
DEFAULTS: dict[str, Any] = {  # diffusers' defaults of the keys that a config.json omits
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": [],
    "qk_norm": None,
}


@dataclass(frozen=True)
class SD3Config:
    """The sizes of one network.

    Args:
        depth: The number of blocks.
        heads: The number of attention heads; the width is heads * head_channels.
        head_channels: The number of channels per head.
        channels: The number of latent channels, in and out.
        patch: The side of a patch, in latent pixels.
        sample_size: The side of the training latent, in latent pixels; positions are relative to it.
        max_positions: The side of the position table, in tokens; an image uses its centre.
        text_channels: The number of channels of a prompt embedding.
        pooled_channels: The number of channels of the pooled text vector.
        dual: The indices of the blocks in which the image also attends to itself alone.
        qk_norm: Whether queries and keys have RMS norms.
    """

    depth: int = 24
    heads: int = 24
    head_channels: int = 64
    channels: int = 16
    patch: int = 2
    sample_size: int = 128
    max_positions: int = 192
    text_channels: int = 4096
    pooled_channels: int = 2048
    dual: tuple[int, ...] = ()
    qk_norm: bool = False

    @property
    def width(self) -> int:
        """The number of channels of a token."""
        return self.heads * self.head_channels


def read_config(folder: Path) -> SD3Config:
    """Read the sizes from a `config.json` of diffusers' `SD3Transformer2DModel`.

    Args:
        folder: The network's folder.

    Returns:
        The sizes.

    Raises:
        CheckpointError: No such file, another class, or an option that this network does not support.
    """
    path, raw = folder / "config.json", read_network_config(folder, (CLASS_NAME,), DEFAULTS)
    if raw["out_channels"] is None:
        raw["out_channels"] = raw["in_channels"]
    sizes = [name for name in DEFAULTS if name not in ("dual_attention_layers", "qk_norm")]
    check_sizes(raw, path, sizes)
    raw["dual_attention_layers"] = raw["dual_attention_layers"] or []
    check_lists(raw, path, ("dual_attention_layers",))
    if raw["out_channels"] != raw["in_channels"]:
        raise CheckpointError(f"{path}: out_channels is not in_channels; only networks that output a latent load here")
    if raw["qk_norm"] not in (None, "rms_norm"):
        raise CheckpointError(f"{path}: qk_norm={raw['qk_norm']!r} is not supported; only rms_norm and none are")
    config = SD3Config(
        depth=raw["num_layers"],
        heads=raw["num_attention_heads"],
        head_channels=raw["attention_head_dim"],
        channels=raw["in_channels"],
        patch=raw["patch_size"],
        sample_size=raw["sample_size"],
        max_positions=raw["pos_embed_max_size"],
        text_channels=raw["joint_attention_dim"],
        pooled_channels=raw["pooled_projection_dim"],
        dual=tuple(raw["dual_attention_layers"]),
        qk_norm=raw["qk_norm"] is not None,
    )
    if raw["caption_projection_dim"] != config.width:
        raise CheckpointError(
            f"{path}: caption_projection_dim={raw['caption_projection_dim']}; this network needs the "
            f"width of the image tokens, {config.width}"
        )
    return config


def tensor_shapes(config: SD3Config) -> TensorShapes:
    """Return the shape of every tensor of the network, by published name."""
    found, width = TensorShapes(), config.width
    found.conv("pos_embed.proj", config.channels, width, config.patch, config.patch)
    found["pos_embed.pos_embed"] = (1, config.max_positions**2, width)
    found.linear("context_embedder", config.text_channels, width)
    found.embedder("time_text_embed.timestep_embedder", TIME_CHANNELS, width)
    found.embedder("time_text_embed.text_embedder", config.pooled_channels, width)
    head_norm = config.head_channels if config.qk_norm else None
    for n in range(config.depth):
        block, last, dual = f"transformer_blocks.{n}", n == config.depth - 1, n in config.dual
        found.linear(f"{block}.norm1.linear", width, (9 if dual else 6) * width)
        found.linear(f"{block}.norm1_context.linear", width, (2 if last else 6) * width)
        found.joint_attention(f"{block}.attn", width, head_norm, last)
        if dual:
            found.attention(f"{block}.attn2", width)
            if head_norm is not None:
                found.gains((f"{block}.attn2.norm_q", f"{block}.attn2.norm_k"), head_norm)
        found.feed_forward(f"{block}.ff", width)
        if not last:
            found.feed_forward(f"{block}.ff_context", width)
    found.linear("norm_out.linear", width, 2 * width)
    found.linear("proj_out", width, config.patch**2 * config.channels)
    return found


def expected(folder: Path) -> TensorShapes:
    """Check the denoiser's config.json in a folder, and return the shapes of its tensors. Raises CheckpointError."""
    return tensor_shapes(read_config(folder))
