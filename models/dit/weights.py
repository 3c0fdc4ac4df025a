"""The map between the names and sizes of a checkpoint in diffusers' layout and those of the network."""

from __future__ import annotations

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
