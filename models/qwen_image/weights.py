"""The map between the names and sizes of a checkpoint in diffusers' layout and those of the network."""

from __future__ import annotations

from models.names import JOINT_ATTENTION, NameMap
from models.plan import Dims, ParallelPlan, PrecomputePlan, Stack

NAMES = NameMap(  # diffusers' QwenImageTransformer2DModel on the left, this network on the right
    (
        ("time_text_embed.timestep_embedder", "time"),
        ("txt_norm", "text_norm"),
        ("txt_in", "text_in"),
        ("img_in", "image_in"),
        ("transformer_blocks", "blocks"),
        ("img_mod.1", "modulation"),
        ("txt_mod.1", "text_modulation"),
        *JOINT_ATTENTION,
        ("img_mlp.net.0.proj", "feed_forward.up"),
        ("img_mlp.net.2", "feed_forward.down"),
        ("txt_mlp.net.0.proj", "text_feed_forward.up"),
        ("txt_mlp.net.2", "text_feed_forward.down"),
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
                "text_rope_2SF": Dims(batch=None, tokens=1),
                "mask_BS": Dims(tokens=1),
            },
            outputs=("x_BLD", "text_BSD"),
            streams=("text_BSD", "x_BLD"),
            signal="heads",
        ),
    ),
    column=("blocks.*.to_q", "blocks.*.to_k", "blocks.*.to_v", "blocks.*.up"),
    row=("blocks.*.to_out", "blocks.*.text_to_out", "blocks.*.down"),
)
PRECOMPUTE = PrecomputePlan(
    time_chains=(("blocks.*.modulation",), ("blocks.*.text_modulation",), ("head_modulation",)),
    time_argument="time_BD",
)
