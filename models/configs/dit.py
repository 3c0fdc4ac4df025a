"""The sizes of DiT's network, read from its config.json, and the tensors it needs; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.configs.shapes import TensorShapes
from models.files import CheckpointError, check_numbers, check_options, check_sizes, read_network_config

TIME_CHANNELS = 256
CLASS_NAME = "DiTTransformer2DModel"
CLASSES = (CLASS_NAME, "Transformer2DModel")  # older files have the second, which diffusers reads as the first
SIZES = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "patch_size",
    "sample_size",
    "num_embeds_ada_norm",
)
ONLY = {
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "upcast_attention": False,
}


@dataclass(frozen=True)
class DiTConfig:
    """The sizes of one network; the defaults are DiT-XL/2 at 256 x 256.

    Args:
        depth: The number of transformer blocks.
        heads: The number of attention heads; the width is heads * head_channels.
        head_channels: The number of channels per head.
        in_channels: The number of latent channels.
        out_channels: The number of output channels, twice the latent channels with a learned variance.
        patch: The side of a patch, in latent pixels.
        sample_size: The side of the training latent, in latent pixels; positions are relative to it.
        classes: The number of classes without the null class, whose index comes after them.
        norm_eps: The epsilon of the norm before a block's feed-forward; the other norms have 1e-6.
    """

    depth: int = 28
    heads: int = 16
    head_channels: int = 72
    in_channels: int = 4
    out_channels: int = 8
    patch: int = 2
    sample_size: int = 32
    classes: int = 1000
    norm_eps: float = 1e-5

    @property
    def width(self) -> int:
        """The number of channels of a token."""
        return self.heads * self.head_channels


def read_config(folder: Path) -> DiTConfig:
    """Read the sizes from a `config.json` of diffusers' `DiTTransformer2DModel`, or of its former class.

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
    check_options(raw, path, ONLY)
    check_sizes(raw, path, SIZES)
    check_numbers(raw, path, ("norm_eps",))
    channels = raw["in_channels"]
    out_channels = channels if raw.get("out_channels") is None else raw["out_channels"]
    if out_channels not in (channels, 2 * channels):
        raise CheckpointError(f"{path}: out_channels={out_channels}; a network outputs in_channels, or twice it")
    return DiTConfig(
        depth=raw["num_layers"],
        heads=raw["num_attention_heads"],
        head_channels=raw["attention_head_dim"],
        in_channels=channels,
        out_channels=out_channels,
        patch=raw["patch_size"],
        sample_size=raw["sample_size"],
        classes=raw["num_embeds_ada_norm"],
        norm_eps=float(raw.get("norm_eps", 1e-5)),
    )


def tensor_shapes(config: DiTConfig) -> TensorShapes:
    """Return the shape of every tensor of the network, by published name."""
    found, width = TensorShapes(), config.width
    found.conv("pos_embed.proj", config.in_channels, width, config.patch, config.patch)
    for block in (f"transformer_blocks.{n}" for n in range(config.depth)):
        found.embedder(f"{block}.norm1.emb.timestep_embedder", TIME_CHANNELS, width)
        found[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = (config.classes + 1, width)
        found.linear(f"{block}.norm1.linear", width, 6 * width)
        found.attention(f"{block}.attn1", width)
        found.feed_forward(f"{block}.ff", width)
    found.linear("proj_out_1", width, 2 * width)
    found.linear("proj_out_2", width, config.patch**2 * config.out_channels)
    return found


def expected(folder: Path) -> TensorShapes:
    """Check the denoiser's config.json in a folder, and return the shapes of its tensors. Raises CheckpointError."""
    return tensor_shapes(read_config(folder))
