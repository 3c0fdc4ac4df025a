"""The map between the names and sizes of a checkpoint in diffusers' layout and those of the network."""

from __future__ import annotations

from models.names import NameMap
from models.plan import Dims, ParallelPlan, PrecomputePlan, Stack

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
