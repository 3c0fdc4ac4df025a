"""The tensors of diffusers' UNet2DModel, of DDPM and NCSN++, from its config.json; without torch.

There is no table for blocks other than those below, nor for inputs that `models.configs.unet` rejects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.configs.options import (
    SIZE,
    SIZES,
    Rule,
    is_flag,
    is_size,
    known_options,
    list_of,
    one_of,
    optional,
    per_level,
)
from models.configs.shapes import TensorShapes
from models.configs.unet_blocks import BlockShapes, down_channels, up_channels

DOWN = ("DownBlock2D", "AttnDownBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")
RULES: Mapping[str, Rule] = {
    "in_channels": (3, SIZE),
    "out_channels": (3, SIZE),
    "time_embedding_type": ("positional", one_of("positional", "fourier")),
    "time_embedding_dim": (None, optional(is_size)),
    "down_block_types": ([DOWN[0], DOWN[1], DOWN[1], DOWN[1]], list_of(one_of(*DOWN))),
    "mid_block_type": ("UNetMidBlock2D", one_of("UNetMidBlock2D", None)),
    "up_block_types": ([UP[1], UP[1], UP[1], UP[0]], list_of(one_of(*UP))),
    "block_out_channels": ([224, 448, 672, 896], SIZES),
    "layers_per_block": (2, SIZE),
    "downsample_type": ("conv", one_of("conv", "resnet")),
    "upsample_type": ("conv", one_of("conv", "resnet")),
    "attention_head_dim": (8, optional(is_size)),
    "attn_norm_num_groups": (None, optional(is_size)),
    "resnet_time_scale_shift": ("default", one_of("default", "scale_shift")),
    "add_attention": (True, is_flag),
    "class_embed_type": (None, one_of(None)),
    "num_class_embeds": (None, one_of(None)),
}
"""The rule of each option that has a say in the tensors."""
WITHOUT_EFFECT = (
    "sample_size",
    "center_input_sample",
    "freq_shift",
    "flip_sin_to_cos",
    "mid_block_scale_factor",
    "downsample_padding",
    "dropout",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "num_train_timesteps",
)
"""The options that have none."""


def tensor_shapes(raw: Mapping[str, object]) -> TensorShapes | None:
    """Return the shape of every tensor of the network, by published name.

    Args:
        raw: The content of its config.json.

    Returns:
        The shapes; None if there is no table for an option.

    Raises:
        RefusedOption: A size that the network cannot have.
    """
    options = known_options(raw, RULES, WITHOUT_EFFECT)
    if options is None:
        return None
    widths = options["block_out_channels"]
    if per_level(options, len(widths), ("down_block_types", "up_block_types")) is None:
        return None
    time = options["time_embedding_dim"] or 4 * widths[0]
    found = BlockShapes(time, options["resnet_time_scale_shift"] == "scale_shift")
    found.conv("conv_in", options["in_channels"], widths[0], 3, 3)
    if options["time_embedding_type"] == "fourier":
        found["time_proj.weight"] = (widths[0],)
    found.embedder("time_embedding", (2 if "time_proj.weight" in found else 1) * widths[0], time)
    _add_levels(found, options)
    found.norm("conv_norm_out", widths[0])
    found.conv("conv_out", widths[0], options["out_channels"], 3, 3)
    return found


def _add_levels(found: BlockShapes, options: Mapping[str, Any]) -> None:
    """Add the levels on the way down, in the middle and on the way up."""
    widths, count = options["block_out_channels"], options["layers_per_block"]
    last = len(widths) - 1

    def attend(name: str, channels: int) -> None:
        found.pixel_attention(name, channels, options["attention_head_dim"] or channels)

    for level, kind in enumerate(options["down_block_types"]):
        name = f"down_blocks.{level}"
        found.level(name, kind, down_channels(widths, level, count), attend)
        if level < last:
            resnet = kind == "AttnDownBlock2D" and options["downsample_type"] == "resnet"
            found.downsample(name, kind, widths[level], resnet)
    if options["mid_block_type"] is not None:
        found.level("mid_block", "UNetMidBlock2D", [(widths[-1], widths[-1])] * 2, attend)
        if options["add_attention"]:
            norm = not found.scale_shift or options["attn_norm_num_groups"] is not None
            head_channels = options["attention_head_dim"] or widths[-1]
            found.pixel_attention("mid_block.attentions.0", widths[-1], head_channels, norm)
    for step, kind in enumerate(options["up_block_types"]):
        name = f"up_blocks.{step}"
        found.level(name, kind, up_channels(widths, step, count + 1), attend)
        if step < last:
            resnet = kind == "AttnUpBlock2D" and options["upsample_type"] == "resnet"
            found.upsample(name, kind, widths[last - step], resnet)
