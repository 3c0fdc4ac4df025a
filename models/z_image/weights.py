"""The map between the names and sizes of a checkpoint in diffusers' layout and those of the network."""

from __future__ import annotations

from models.names import NameMap
from models.plan import Dims, ParallelPlan, PrecomputePlan, Stack

NAMES = NameMap(  # diffusers' ZImageTransformer2DModel on the left, this network on the right
    (
        ("all_x_embedder.2-1", "image_in"),
        ("all_final_layer.2-1.adaLN_modulation.1", "head_modulation"),
        ("all_final_layer.2-1.linear", "project_out"),
        ("x_pad_token", "image_pad"),
        ("cap_pad_token", "text_pad"),
        ("t_embedder.mlp.0", "time_in"),
        ("t_embedder.mlp.2", "time_out"),
        ("cap_embedder.0", "text_norm"),
        ("cap_embedder.1", "text_in"),
        ("adaLN_modulation.0", "modulation"),
        ("to_out.0", "to_out"),
        ("feed_forward.w1", "feed_forward.gate"),
        ("feed_forward.w2", "feed_forward.down"),
        ("feed_forward.w3", "feed_forward.up"),
    )
)
TEXT_ARGUMENTS = {"x_BJD": Dims(tokens=1), "rope_2BJF": Dims(batch=1, tokens=2), "mask_BJ": Dims(tokens=1)}
ARGUMENTS = {**TEXT_ARGUMENTS, "time_BA": Dims()}
PLAN = ParallelPlan(
    heads="heads",
    stacks=(
        Stack("noise_refiner", ARGUMENTS, outputs=("x_BJD",), streams=("x_BJD",), cacheable=False),
        Stack("context_refiner", TEXT_ARGUMENTS, outputs=("x_BJD",), streams=("x_BJD",), cacheable=False),
        Stack("layers", ARGUMENTS, outputs=("x_BJD",), streams=("x_BJD",), mask="mask_BJ", signal="attention"),
    ),
    column=("*.attention.to_q", "*.attention.to_k", "*.attention.to_v", "*.feed_forward.gate", "*.feed_forward.up"),
    row=("*.attention.to_out", "*.feed_forward.down"),
)
PRECOMPUTE = PrecomputePlan(
    time_chains=(("noise_refiner.*.modulation",), ("layers.*.modulation",), ("head_modulation",)),
    time_argument="time_BA",
)
