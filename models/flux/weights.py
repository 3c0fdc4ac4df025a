"""The map between the names and sizes of a checkpoint in diffusers' layout and those of the network."""

from __future__ import annotations

from models.names import JOINT_ATTENTION, NameMap
from models.plan import Dims, ParallelPlan, PrecomputePlan, Stack

NAMES = NameMap(  # diffusers' FluxTransformer2DModel on the left, this network on the right
    (
        ("x_embedder", "image_in"),
        ("context_embedder", "text_in"),
        ("time_text_embed.timestep_embedder", "time"),
        ("time_text_embed.guidance_embedder", "guidance"),
        ("time_text_embed.text_embedder", "pooled"),
        ("transformer_blocks", "blocks"),
        ("single_transformer_blocks", "single_blocks"),
        ("norm1.linear", "modulation"),
        ("norm1_context.linear", "text_modulation"),
        *JOINT_ATTENTION,
        ("proj_mlp", "up"),  # before the names that end in it: to_published() goes backwards
        ("ff.net.0.proj", "feed_forward.up"),
        ("ff.net.2", "feed_forward.down"),
        ("ff_context.net.0.proj", "text_feed_forward.up"),
        ("ff_context.net.2", "text_feed_forward.down"),
        ("norm.linear", "single_modulation"),
        ("norm_out.linear", "head_modulation"),
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
                "text_BSD": Dims(tokens=1),
                "time_BD": Dims(),
                "rope_2LF": Dims(batch=None, tokens=1),
            },
            outputs=("x_BLD", "text_BSD"),
            streams=("text_BSD", "x_BLD"),
            signal="heads",
        ),
        Stack("single_blocks", {"x_BLD": Dims(tokens=1), "time_BD": Dims(), "rope_2LF": Dims(batch=None, tokens=1)}),
    ),
    column=(
        "blocks.*.to_q",
        "blocks.*.to_k",
        "blocks.*.to_v",
        "blocks.*.up",
        "single_blocks.*.to_q",
        "single_blocks.*.to_k",
        "single_blocks.*.to_v",
        "single_blocks.*.up",
    ),
    row=("blocks.*.to_out", "blocks.*.text_to_out", "blocks.*.down"),
    joined_rows={"single_blocks.*.project_out": (1, 4)},  # attention, feed-forward
)
PRECOMPUTE = PrecomputePlan(
    time_chains=(
        ("blocks.*.modulation",),
        ("blocks.*.text_modulation",),
        ("single_blocks.*.single_modulation",),
        ("head_modulation",),
    ),
    time_argument="time_BD",
)
