"""The map between the names and sizes of a checkpoint in diffusers' layout and those of the network."""

from __future__ import annotations

from models.names import JOINT_ATTENTION, NameMap
from models.plan import Dims, ParallelPlan, PrecomputePlan, Stack

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
