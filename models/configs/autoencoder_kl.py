"""The tensors of diffusers' AutoencoderKL, from its config.json; without torch.

There is no table for blocks other than those below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from models.configs.options import SIZE, SIZES, Rule, is_flag, known_options, list_of, one_of, per_level
from models.configs.shapes import TensorShapes
from models.configs.unet_blocks import BlockShapes, down_channels

DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
RULES: Mapping[str, Rule] = {
    "in_channels": (3, SIZE),
    "out_channels": (3, SIZE),
    "down_block_types": ([DOWN[0]], list_of(one_of(*DOWN))),
    "up_block_types": ([UP[0]], list_of(one_of(*UP))),
    "block_out_channels": ([64], SIZES),
    "layers_per_block": (1, SIZE),
    "latent_channels": (4, SIZE),
    "use_quant_conv": (True, is_flag),
    "use_post_quant_conv": (True, is_flag),
    "mid_block_add_attention": (True, is_flag),
}
"""The rule of each option that has a say in the tensors."""
WITHOUT_EFFECT = (
    "act_fn",
    "norm_num_groups",
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
)
"""The options that have none."""


def tensor_shapes(raw: Mapping[str, object]) -> TensorShapes | None:
    """Return the shape of every tensor of encoder and decoder, by published name.

    Args:
        raw: The content of its config.json.

    Returns:
        The shapes; None if there is no table for an option.

    Raises:
        RefusedOption: A size that the autoencoder cannot have.
    """
    options = known_options(raw, RULES, WITHOUT_EFFECT)
    if options is None:
        return None
    widths, count, latent = options["block_out_channels"], options["layers_per_block"], options["latent_channels"]
    if per_level(options, len(widths), ("down_block_types", "up_block_types")) is None:
        return None
    found, attention = BlockShapes(), options["mid_block_add_attention"]
    found.conv("encoder.conv_in", options["in_channels"], widths[0], 3, 3)
    _add_levels(found, "encoder.down_blocks", options["down_block_types"], widths, count)
    _add_ends(found, "encoder", widths[-1], attention, widths[-1], 2 * latent)
    if options["use_quant_conv"]:
        found.conv("quant_conv", 2 * latent, 2 * latent, 1, 1)
    if options["use_post_quant_conv"]:
        found.conv("post_quant_conv", latent, latent, 1, 1)
    found.conv("decoder.conv_in", latent, widths[-1], 3, 3)
    _add_levels(found, "decoder.up_blocks", options["up_block_types"], widths[::-1], count + 1)
    _add_ends(found, "decoder", widths[-1], attention, widths[0], options["out_channels"])
    return found


def _add_levels(found: BlockShapes, blocks: str, kinds: Sequence[str], widths: Sequence[int], count: int) -> None:
    """Add the levels of one half, in their order; all but the last change the resolution."""
    resample = found.downsample if blocks.endswith("down_blocks") else found.upsample
    for level, kind in enumerate(kinds):
        name = f"{blocks}.{level}"
        found.level(
            name,
            kind,
            down_channels(widths, level, count),
            lambda attention, channels: found.pixel_attention(attention, channels, channels),
        )
        if level < len(kinds) - 1:
            resample(name, kind, widths[level])


def _add_ends(found: BlockShapes, half: str, middle: int, attention: bool, width: int, out: int) -> None:
    """Add the middle of one half, and its last norm and convolution."""
    for n in range(2):
        found.resnet(f"{half}.mid_block.resnets.{n}", middle, middle)
    if attention:
        found.pixel_attention(f"{half}.mid_block.attentions.0", middle, middle)
    found.norm(f"{half}.conv_norm_out", width)
    found.conv(f"{half}.conv_out", width, out, 3, 3)
