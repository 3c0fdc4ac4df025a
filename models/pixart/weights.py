"""The map between the names and sizes of a checkpoint in diffusers' layout and those of the network."""

from __future__ import annotations

from models.names import NameMap
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
