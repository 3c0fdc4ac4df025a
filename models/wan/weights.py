"""The map between the names and sizes of a checkpoint in diffusers' layout and those of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.files import CheckpointError, check_sizes, read_network_config
from models.names import NameMap
from models.plan import Dims, ParallelPlan, PrecomputePlan, Stack
from models.wan.network import WanConfig

NAMES = NameMap(  # diffusers' WanTransformer3DModel on the left, this network on the right
    (
        ("patch_embedding", "patch_embed"),
        ("condition_embedder.time_embedder.linear_1", "time_in"),
        ("condition_embedder.time_embedder.linear_2", "time_out"),
        ("condition_embedder.time_proj", "time_modulation"),
        ("condition_embedder.text_embedder.linear_1", "text_in"),
        ("condition_embedder.text_embedder.linear_2", "text_out"),
        ("attn1", "self_attention"),
        ("attn2", "cross_attention"),
        ("to_out.0", "to_out"),
        ("norm2", "cross_norm"),
        ("ffn.net.0.proj", "feed_forward.up"),
        ("ffn.net.2", "feed_forward.down"),
        ("proj_out", "project_out"),
    )
)
PLAN = ParallelPlan(
    heads="heads",
    stacks=(
        Stack(
            "blocks",
            {
                "x_BLD": Dims(tokens=1),
                "text_BSD": Dims(),
                "modulation_B6D": Dims(),
                "rope_2LE": Dims(batch=None, tokens=1),
            },
            replicated=("text_BSD",),
            signal="modulation_B6D",
        ),
    ),
    column=("blocks.*.to_q", "blocks.*.to_k", "blocks.*.to_v", "blocks.*.feed_forward.up"),
    row=("blocks.*.to_out", "blocks.*.feed_forward.down"),
    local_attention=("blocks.*.cross_attention",),
    head_norms=("blocks.*.norm_q", "blocks.*.norm_k"),
)
PRECOMPUTE = PrecomputePlan(
    text_chains=(
        ("blocks.*.cross_attention.to_k", "blocks.*.cross_attention.norm_k"),
        ("blocks.*.cross_attention.to_v",),
    ),
    text_argument="text_BSD",
)
KEEP_FLOAT32 = ("time_in.*", "time_out.*", "*scale_shift_table", "blocks.*.cross_norm.*")
"""Parameters that stay float32 in a bfloat16 network (diffusers' `_keep_in_fp32_modules`)."""

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
    if raw["attention_head_dim"] % 2 or raw["freq_dim"] % 2:
        raise CheckpointError(f"{path}: attention_head_dim and freq_dim must be even")
    if raw["qk_norm"] != "rms_norm_across_heads":
        raise CheckpointError(f"{path}: qk_norm={raw['qk_norm']!r} is not supported; only rms_norm_across_heads is")
    time, rows, columns = raw["patch_size"]
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
