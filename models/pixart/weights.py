"""The map between the names and sizes of a checkpoint in diffusers' layout and those of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.files import CheckpointError, check_options, check_sizes, read_network_config
from models.names import NameMap
from models.pixart.network import PixArtConfig
from models.plan import Dims, ParallelPlan, PrecomputePlan, Stack

NAMES = NameMap(  # diffusers' PixArtTransformer2DModel on the left, this network on the right
    (
        ("pos_embed.proj", "patch_embed"),
        ("adaln_single.emb.timestep_embedder.linear_1", "time_in"),
        ("adaln_single.emb.timestep_embedder.linear_2", "time_out"),
        ("adaln_single.emb.resolution_embedder.linear_1", "size.side_in"),
        ("adaln_single.emb.resolution_embedder.linear_2", "size.side_out"),
        ("adaln_single.emb.aspect_ratio_embedder.linear_1", "size.ratio_in"),
        ("adaln_single.emb.aspect_ratio_embedder.linear_2", "size.ratio_out"),
        ("adaln_single.linear", "time_modulation"),
        ("caption_projection.linear_1", "text_in"),
        ("caption_projection.linear_2", "text_out"),
        ("transformer_blocks", "blocks"),
        ("attn1", "self_attention"),
        ("attn2", "cross_attention"),
        ("to_out.0", "to_out"),
        ("ff.net.0.proj", "feed_forward.up"),
        ("ff.net.2", "feed_forward.down"),
        ("proj_out", "project_out"),
    )
)
PLAN = ParallelPlan(
    heads="heads",
    stacks=(
        Stack(
            "blocks",
            {"x_BLD": Dims(tokens=1), "modulation_B6D": Dims(), "text_BSD": Dims(), "mask_BS": Dims()},
            replicated=("text_BSD",),
            signal="self_attention",
        ),
    ),
    column=("blocks.*.to_q", "blocks.*.to_k", "blocks.*.to_v", "blocks.*.feed_forward.up"),
    row=("blocks.*.to_out", "blocks.*.feed_forward.down"),
    local_attention=("blocks.*.cross_attention",),
)
PRECOMPUTE = PrecomputePlan(
    text_chains=(("blocks.*.cross_attention.to_k",), ("blocks.*.cross_attention.to_v",)),
    text_argument="text_BSD",
)
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
