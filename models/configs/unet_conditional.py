"""The tensors of diffusers' UNet2DConditionModel, from its config.json; without torch.

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
    one_or_list_of,
    optional,
    per_level,
)
from models.configs.shapes import TensorShapes
from models.configs.unet_blocks import Attend, BlockShapes, down_channels, up_channels

PLAIN_DOWN, TEXT_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
PLAIN_UP, TEXT_UP = "UpBlock2D", "CrossAttnUpBlock2D"
PLAIN_MID, TEXT_MID = "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"
RULES: Mapping[str, Rule] = {
    "in_channels": (4, SIZE),
    "out_channels": (4, SIZE),
    "down_block_types": ([TEXT_DOWN, TEXT_DOWN, TEXT_DOWN, PLAIN_DOWN], list_of(one_of(PLAIN_DOWN, TEXT_DOWN))),
    "mid_block_type": (TEXT_MID, one_of(TEXT_MID, PLAIN_MID, None)),
    "up_block_types": ([PLAIN_UP, TEXT_UP, TEXT_UP, TEXT_UP], list_of(one_of(PLAIN_UP, TEXT_UP))),
    "only_cross_attention": (False, one_or_list_of(is_flag)),
    "block_out_channels": ([320, 640, 1280, 1280], SIZES),
    "layers_per_block": (2, one_or_list_of(is_size)),
    "norm_num_groups": (32, optional(is_size)),
    "cross_attention_dim": (1280, one_or_list_of(is_size)),
    "transformer_layers_per_block": (1, one_or_list_of(is_size)),
    "reverse_transformer_layers_per_block": (None, optional(list_of(is_size))),
    "encoder_hid_dim": (None, optional(is_size)),
    "encoder_hid_dim_type": (None, one_of(None, "text_proj")),
    "attention_head_dim": (8, one_or_list_of(is_size)),  # the number of heads, in this class
    "num_attention_heads": (None, one_of(None)),
    "dual_cross_attention": (False, one_of(False)),
    "use_linear_projection": (False, is_flag),
    "class_embed_type": (None, one_of(None)),
    "addition_embed_type": (None, one_of(None, "text_time")),
    "num_class_embeds": (None, one_of(None)),
    "resnet_time_scale_shift": ("default", one_of("default", "scale_shift")),
    "time_embedding_type": ("positional", one_of("positional", "fourier")),
    "time_embedding_dim": (None, optional(is_size)),
    "time_cond_proj_dim": (None, one_of(None)),
    "conv_in_kernel": (3, SIZE),
    "conv_out_kernel": (3, SIZE),
    "projection_class_embeddings_input_dim": (None, optional(is_size)),
    "attention_type": ("default", one_of("default")),
    "class_embeddings_concat": (False, one_of(False)),
}
"""The rule of each option that has a say in the tensors."""
WITHOUT_EFFECT = (
    "sample_size",
    "center_input_sample",
    "flip_sin_to_cos",
    "freq_shift",
    "downsample_padding",
    "mid_block_scale_factor",
    "dropout",
    "act_fn",
    "norm_eps",
    "addition_time_embed_dim",
    "upcast_attention",
    "resnet_skip_time_act",
    "resnet_out_scale_factor",
    "time_embedding_act_fn",
    "timestep_post_act",
    "mid_block_only_cross_attention",
    "cross_attention_norm",
    "addition_embed_type_num_heads",
)
"""The options that have none, with the blocks above."""
PER_LEVEL = (
    "down_block_types",
    "up_block_types",
    "only_cross_attention",
    "layers_per_block",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "attention_head_dim",
)


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
    lists = None if options is None else per_level(options, len(options["block_out_channels"]), PER_LEVEL)
    if options is None or lists is None or not _is_complete(options):
        return None
    widths = options["block_out_channels"]
    fourier = options["time_embedding_type"] == "fourier"
    time = options["time_embedding_dim"] or (2 if fourier else 4) * widths[0]
    found = BlockShapes(time, options["resnet_time_scale_shift"] == "scale_shift")
    found.conv("conv_in", options["in_channels"], widths[0], *[options["conv_in_kernel"]] * 2)
    _add_embeddings(found, options, time, fourier)
    _add_levels(found, options, lists)
    if options["norm_num_groups"] is not None:
        found.norm("conv_norm_out", widths[0])
    found.conv("conv_out", widths[0], options["out_channels"], *[options["conv_out_kernel"]] * 2)
    return found


def _is_complete(options: Mapping[str, Any]) -> bool:
    """Return whether options that need another one have it, as diffusers wants them."""
    context, depths = options["cross_attention_dim"], options["reverse_transformer_layers_per_block"]
    projects = options["encoder_hid_dim"] is not None
    return (
        (projects or options["encoder_hid_dim_type"] is None)
        and not (projects and isinstance(context, list))
        and (depths is None or len(depths) == len(options["block_out_channels"]))
        and not (options["addition_embed_type"] and options["projection_class_embeddings_input_dim"] is None)
    )


def _add_embeddings(found: BlockShapes, options: Mapping[str, Any], time: int, fourier: bool) -> None:
    """Add the embeddings of the time, the text, and SDXL's image size."""
    if fourier:
        found["time_proj.weight"] = (time // 2,)
    found.embedder("time_embedding", time if fourier else options["block_out_channels"][0], time)
    if options["encoder_hid_dim"] is not None:
        found.linear("encoder_hid_proj", options["encoder_hid_dim"], options["cross_attention_dim"])
    if options["addition_embed_type"] is not None:
        found.embedder("add_embedding", options["projection_class_embeddings_input_dim"], time)


def _add_levels(found: BlockShapes, options: Mapping[str, Any], lists: Mapping[str, list[Any]]) -> None:
    """Add the levels on the way down, in the middle and on the way up."""
    widths = options["block_out_channels"]
    last = len(widths) - 1
    depths, linear = lists["transformer_layers_per_block"], options["use_linear_projection"]
    up_depths = options["reverse_transformer_layers_per_block"] or depths[::-1]

    def transformers(level: int, depth: int, only_cross: bool) -> Attend:
        heads, context = lists["attention_head_dim"][level], lists["cross_attention_dim"][level]
        return lambda name, channels: found.text_transformer(name, channels, heads, context, depth, linear, only_cross)

    for level in range(last + 1):
        name, kind, count = f"down_blocks.{level}", lists["down_block_types"][level], lists["layers_per_block"][level]
        attend = transformers(level, depths[level], lists["only_cross_attention"][level])
        found.level(name, kind, down_channels(widths, level, count), attend)
        if level < last:
            found.downsample(name, kind, widths[level])
    if options["mid_block_type"] is not None:
        middle = [(widths[-1], widths[-1])] * (2 if options["mid_block_type"] == TEXT_MID else 1)
        found.level("mid_block", PLAIN_MID, middle, transformers(last, depths[-1], False))
        if options["mid_block_type"] == TEXT_MID:
            transformers(last, depths[-1], False)("mid_block.attentions.0", widths[-1])
    for step in range(last + 1):
        level = last - step
        name, kind, count = f"up_blocks.{step}", lists["up_block_types"][step], lists["layers_per_block"][level] + 1
        attend = transformers(level, up_depths[step], lists["only_cross_attention"][level])
        found.level(name, kind, up_channels(widths, step, count), attend)
        if step < last:
            found.upsample(name, kind, widths[level])
