"""Names and sizes: how a checkpoint in diffusers' layout maps onto the network, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.files import CheckpointError, read_json
from models.names import NameMap
from models.pixart.network import PixArtConfig
from models.plan import ParallelPlan, Stack

NAMES = NameMap(  # diffusers' PixArtTransformer2DModel on the left, this network on the right
    (
        ("pos_embed.proj", "patch_embed"),
        ("adaln_single.emb.timestep_embedder.linear_1", "time_in"),
        ("adaln_single.emb.timestep_embedder.linear_2", "time_out"),
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
    stacks=(Stack("blocks", sharded={"x_BLD": 1}, replicated=("text_BSD",)),),
    column=("blocks.*.to_q", "blocks.*.to_k", "blocks.*.to_v", "blocks.*.feed_forward.up"),
    row=("blocks.*.to_out", "blocks.*.feed_forward.down"),
)
CLASS_NAME = "PixArtTransformer2DModel"
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


def read_config(folder: Path) -> PixArtConfig:
    """The sizes from a `config.json` of diffusers' `PixArtTransformer2DModel`.

    Raises:
        CheckpointError: no such file, another class, or an option that this network does not have.
    """
    path = folder / "config.json"
    raw: dict[str, Any] = read_json(path)
    if raw.get("_class_name") != CLASS_NAME:
        raise CheckpointError(f"{path}: _class_name is {raw.get('_class_name')!r}, this network loads {CLASS_NAME}")
    if raw.get("use_additional_conditions"):
        raise CheckpointError(f"{path}: use_additional_conditions (size and aspect embeddings) is not supported")
    if missing := [name for name in SIZES if not isinstance(raw.get(name), int)]:
        raise CheckpointError(f"{path}: no whole number under {', '.join(missing)}")
    if raw["out_channels"] != raw["in_channels"]:
        raise CheckpointError(f"{path}: out_channels is not in_channels; a learned variance is not supported")
    return PixArtConfig(
        depth=raw["num_layers"],
        heads=raw["num_attention_heads"],
        head_channels=raw["attention_head_dim"],
        in_channels=raw["in_channels"],
        out_channels=raw["out_channels"],
        patch=raw["patch_size"],
        sample_size=raw["sample_size"],
        text_channels=raw["caption_channels"],
        position_scale=float(raw.get("interpolation_scale") or max(raw["sample_size"] // 64, 1)),
    )


def config_json(config: PixArtConfig) -> dict[str, Any]:
    """The `config.json` that makes diffusers build the same network."""
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
        "use_additional_conditions": False,
    }
