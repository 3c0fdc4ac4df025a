"""The map between the names and sizes of a checkpoint in diffusers' layout and those of the network."""

from __future__ import annotations

from pathlib import Path

from models.dit.network import DiTConfig
from models.files import CheckpointError, check_options, check_sizes, read_network_config
from models.names import NameMap
from models.plan import Dims, ParallelPlan, PrecomputePlan, Stack

NAMES = NameMap(  # diffusers' DiTTransformer2DModel on the left, this network on the right
    (
        ("pos_embed.proj", "patch_embed"),
        ("transformer_blocks", "blocks"),
        ("norm1.emb.timestep_embedder.linear_1", "condition.time_in"),
        ("norm1.emb.timestep_embedder.linear_2", "condition.time_out"),
        ("norm1.emb.class_embedder.embedding_table", "condition.classes"),
        ("norm1.linear", "modulation"),
        ("attn1", "self_attention"),
        ("to_out.0", "to_out"),
        ("ff.net.0.proj", "feed_forward.up"),
        ("ff.net.2", "feed_forward.down"),
        ("proj_out_1", "head_modulation"),
        ("proj_out_2", "project_out"),
    )
)
PLAN = ParallelPlan(
    heads="heads",
    stacks=(
        Stack("blocks", {"x_BLD": Dims(tokens=1), "time_BE": Dims(), "labels_B": Dims()}, signal="self_attention"),
    ),
    column=("blocks.*.to_q", "blocks.*.to_k", "blocks.*.to_v", "blocks.*.feed_forward.up"),
    row=("blocks.*.to_out", "blocks.*.feed_forward.down"),
    called_outside=("blocks.0.condition",),
)
PRECOMPUTE = PrecomputePlan(
    time_chains=(("blocks.*.condition", "blocks.*.modulation"), ("blocks.0.condition", "head_modulation")),
    time_argument="time_BE",
    has_text=False,
)
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
