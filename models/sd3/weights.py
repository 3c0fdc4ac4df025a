"""The map between the names and sizes of a checkpoint in diffusers' layout and those of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.files import CheckpointError, check_sizes, read_network_config
from models.names import JOINT_ATTENTION, NameMap
from models.plan import Dims, ParallelPlan, PrecomputePlan, Stack
from models.sd3.network import SD3Config

NAMES = NameMap(  # diffusers' SD3Transformer2DModel on the left, this network on the right
    (
        ("pos_embed.proj", "patch_embed"),
        ("pos_embed.pos_embed", "positions"),
        ("context_embedder", "text_in"),
        ("time_text_embed.timestep_embedder", "time"),
        ("time_text_embed.text_embedder", "pooled"),
        ("transformer_blocks", "blocks"),
        ("norm1.linear", "modulation"),
        ("norm1_context.linear", "text_modulation"),
        ("attn2.to_q", "dual_heads.to_q"),
        ("attn2.to_k", "dual_heads.to_k"),
        ("attn2.to_v", "dual_heads.to_v"),
        ("attn2.norm_q", "dual_heads.norm_q"),
        ("attn2.norm_k", "dual_heads.norm_k"),
        ("attn2.to_out.0", "dual_to_out"),
        *JOINT_ATTENTION,
        ("ff.net.0.proj", "feed_forward.up"),
        ("ff.net.2", "feed_forward.down"),
        ("ff_context.net.0.proj", "text_feed_forward.up"),
        ("ff_context.net.2", "text_feed_forward.down"),
        ("norm_out.linear", "head_modulation"),
        ("proj_out", "project_out"),
    )
)
PLAN = ParallelPlan(
    heads="heads",
    stacks=(
        Stack(
            "blocks",
            {"x_BLD": Dims(tokens=1), "text_BSD": Dims(tokens=1), "time_BD": Dims()},
            outputs=("x_BLD", "text_BSD"),
            streams=("text_BSD", "x_BLD"),
            signal="heads",
        ),
    ),
    column=("blocks.*.to_q", "blocks.*.to_k", "blocks.*.to_v", "blocks.*.up"),
    row=("blocks.*.to_out", "blocks.*.text_to_out", "blocks.*.dual_to_out", "blocks.*.down"),
)
PRECOMPUTE = PrecomputePlan(
    time_chains=(("blocks.*.modulation",), ("blocks.*.text_modulation",), ("head_modulation",)),
    time_argument="time_BD",
)
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
        dual=tuple(raw["dual_attention_layers"] or ()),
        qk_norm=raw["qk_norm"] is not None,
    )
    if raw["caption_projection_dim"] != config.width:
        raise CheckpointError(
            f"{path}: caption_projection_dim={raw['caption_projection_dim']}; this network needs the "
            f"width of the image tokens, {config.width}"
        )
    return config
