"""The sizes of Wan's network, read from its config.json, and the tensors it needs; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.configs.shapes import TensorShapes
from models.files import CheckpointError, check_lists, check_numbers, check_sizes, read_network_config

CLASS_NAME = "WanTransformer3DModel"
DEFAULTS: dict[str, Any] = {  # diffusers' defaults of the keys that a config.json omits
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
SIZES = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
    "rope_max_seq_len",
)
IMAGE_OPTIONS = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")


@dataclass(frozen=True)
class WanConfig:
    """The sizes of one network.

    Args:
        depth: The number of transformer blocks.
        heads: The number of attention heads; the width is heads * head_channels.
        head_channels: The number of channels per head, an even number.
        hidden: The number of channels inside the feed-forward.
        channels: The number of latent channels, in and out.
        patch: The side of a patch, in latent pixels; a patch spans one latent frame.
        text_channels: The number of channels of a prompt embedding.
        time_channels: The number of channels of the sinusoidal time embedding.
        cross_norm: Whether there is a layer norm before the cross-attention.
        eps: The epsilon of every norm.
        max_positions: The largest number of latent frames, and of patches along a side, that have a position.
    """

    depth: int
    heads: int
    head_channels: int
    hidden: int
    channels: int = 16
    patch: int = 2
    text_channels: int = 4096
    time_channels: int = 256
    cross_norm: bool = True
    eps: float = 1e-6
    max_positions: int = 1024

    @property
    def width(self) -> int:
        """The number of channels of a token."""
        return self.heads * self.head_channels


def read_config(folder: Path) -> WanConfig:
    """Read the sizes from a `config.json` of diffusers' `WanTransformer3DModel`.

    Args:
        folder: The network's folder.

    Returns:
        The sizes.

    Raises:
        CheckpointError: No such file, another class, or an option that this network does not support.
    """
    path, raw = folder / "config.json", read_network_config(folder, (CLASS_NAME,), DEFAULTS)
    if given := [name for name in IMAGE_OPTIONS if raw.get(name) is not None]:
        raise CheckpointError(f"{path}: {given[0]} belongs to image-to-video; only text-to-video checkpoints load here")
    if (raw["out_channels"] or raw["in_channels"]) != raw["in_channels"]:
        raise CheckpointError(
            f"{path}: in_channels is not out_channels, so the network reads more than a noisy latent; only "
            "text-to-video checkpoints load here"
        )
    check_sizes(raw, path, SIZES)
    check_numbers(raw, path, ("eps",))
    check_lists(raw, path, ("patch_size",))
    if raw["attention_head_dim"] % 2 or raw["freq_dim"] % 2:
        raise CheckpointError(f"{path}: attention_head_dim and freq_dim must be even")
    if raw["qk_norm"] != "rms_norm_across_heads":
        raise CheckpointError(f"{path}: qk_norm={raw['qk_norm']!r} is not supported; only rms_norm_across_heads is")
    time, rows, columns = raw["patch_size"] if len(raw["patch_size"]) == 3 else (0, 0, 0)
    if time != 1 or rows != columns:
        raise CheckpointError(f"{path}: patch_size={raw['patch_size']} is not supported; only [1, n, n] is")
    return WanConfig(
        depth=raw["num_layers"],
        heads=raw["num_attention_heads"],
        head_channels=raw["attention_head_dim"],
        hidden=raw["ffn_dim"],
        channels=raw["in_channels"],
        patch=rows,
        text_channels=raw["text_dim"],
        time_channels=raw["freq_dim"],
        cross_norm=bool(raw["cross_attn_norm"]),
        eps=float(raw["eps"]),
        max_positions=raw["rope_max_seq_len"],
    )


def tensor_shapes(config: WanConfig) -> TensorShapes:
    """Return the shape of every tensor of the network, by published name."""
    found, width = TensorShapes(), config.width
    found.conv("patch_embedding", config.channels, width, 1, config.patch, config.patch)
    found.embedder("condition_embedder.time_embedder", config.time_channels, width)
    found.linear("condition_embedder.time_proj", width, 6 * width)
    found.embedder("condition_embedder.text_embedder", config.text_channels, width)
    for block in (f"blocks.{n}" for n in range(config.depth)):
        found[f"{block}.scale_shift_table"] = (1, 6, width)
        for attention in (f"{block}.attn1", f"{block}.attn2"):
            found.attention(attention, width)
            found.gains((f"{attention}.norm_q", f"{attention}.norm_k"), width)
        if config.cross_norm:
            found[f"{block}.norm2.weight"] = found[f"{block}.norm2.bias"] = (width,)
        found.feed_forward(f"{block}.ffn", width, config.hidden)
    found["scale_shift_table"] = (1, 2, width)
    found.linear("proj_out", width, config.patch**2 * config.channels)
    return found


def expected(folder: Path) -> TensorShapes:
    """Check the denoiser's config.json in a folder, and return the shapes of its tensors. Raises CheckpointError."""
    return tensor_shapes(read_config(folder))
