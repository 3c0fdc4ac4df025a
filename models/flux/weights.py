"""The map between the names and sizes of a checkpoint in diffusers' layout and those of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.files import CheckpointError, check_sizes, read_network_config, rotary_axes
from models.flux.network import PATCH, FluxConfig
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
CLASS_NAME = "FluxTransformer2DModel"
DEFAULTS: dict[str, Any] = {  # diffusers' defaults of the keys that a config.json omits
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}


def read_config(folder: Path) -> FluxConfig:
    """Read the sizes from a `config.json` of diffusers' `FluxTransformer2DModel`.

    Args:
        folder: The network's folder.

    Returns:
        The sizes.

    Raises:
        CheckpointError: No such file, another class, or an option that this network does not support.
    """
    path, raw = folder / "config.json", read_network_config(folder, (CLASS_NAME,), DEFAULTS)
    raw["out_channels"] = raw["out_channels"] or raw["in_channels"]
    sizes = [name for name in DEFAULTS if name not in ("guidance_embeds", "axes_dims_rope")]
    check_sizes(raw, path, sizes)
    if raw["out_channels"] != raw["in_channels"]:
        raise CheckpointError(
            f"{path}: in_channels is not out_channels, so the network reads more than a noisy latent (an image to "
            "inpaint or to follow); only text-to-image checkpoints load here"
        )
    if raw["patch_size"] != 1 or raw["in_channels"] % PATCH**2:
        raise CheckpointError(
            f"{path}: patch_size={raw['patch_size']}, in_channels={raw['in_channels']}; only latents packed {PATCH} x "
            f"{PATCH} outside of patches of 1 are supported"
        )
    axes = rotary_axes(raw, path, "axes_dims_rope", raw["attention_head_dim"])
    return FluxConfig(
        depth=raw["num_layers"],
        single_depth=raw["num_single_layers"],
        heads=raw["num_attention_heads"],
        head_channels=raw["attention_head_dim"],
        channels=raw["in_channels"] // PATCH**2,
        text_channels=raw["joint_attention_dim"],
        pooled_channels=raw["pooled_projection_dim"],
        axes=axes,
        guidance=bool(raw["guidance_embeds"]),
    )
