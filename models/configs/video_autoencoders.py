"""The tensors of diffusers' AutoencoderKLWan and AutoencoderKLQwenImage, from their config.json; without torch.

Source: diffusers 0.42.1, models/autoencoders/autoencoder_kl_wan.py and autoencoder_kl_qwenimage.py. There is no table
for an option that these classes do not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.configs.options import (
    FLAG,
    FLAGS,
    NUMBERS,
    OPTIONAL_SIZE,
    SIZE,
    SIZES,
    RefusedOption,
    Rule,
    known_options,
)
from models.configs.shapes import TensorShapes

BOTH: Mapping[str, Rule] = {
    "base_dim": (96, SIZE),
    "z_dim": (16, SIZE),
    "dim_mult": ([1, 2, 4, 4], SIZES),
    "num_res_blocks": (2, SIZE),
    "attn_scales": ([], NUMBERS),
    "temperal_downsample": ([False, True, True], FLAGS),
    "latents_mean": (
        [
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
        ],
        NUMBERS,
    ),
    "latents_std": (
        [
            2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
        ],
        NUMBERS,
    ),
}  # fmt: skip
QWEN_IMAGE_RULES: Mapping[str, Rule] = {**BOTH, "input_channels": (3, SIZE)}
WAN_RULES: Mapping[str, Rule] = {
    **BOTH,
    "decoder_base_dim": (None, OPTIONAL_SIZE),
    "in_channels": (3, SIZE),
    "out_channels": (3, SIZE),
    "is_residual": (False, FLAG),
    "patch_size": (None, OPTIONAL_SIZE),
    "scale_factor_temporal": (4, SIZE),
    "scale_factor_spatial": (8, SIZE),
}
"""The rule of each option that has a say in the tensors or in the latent."""
WITHOUT_EFFECT = ("dropout",)
"""The options that have none."""


@dataclass(frozen=True)
class Half:
    """The sizes of one half.

    Args:
        name: Either encoder or decoder.
        widths: The number of channels before the first level, and of each level.
        blocks: The number of residual blocks of a level.
        over_time: Whether each level but the last changes the number of frames too.
        residual: Whether every level has a shortcut round it, as those of Wan 2.2 have.
    """

    name: str
    widths: Sequence[int]
    blocks: int
    over_time: Sequence[bool]
    residual: bool


class VideoShapes(TensorShapes):
    """The shape of each tensor of an autoencoder of causal convolutions over frames, rows and columns."""

    def rms(self, name: str, channels: int, dimensions: int = 3) -> None:
        """Add an RMS norm over channels."""
        self[f"{name}.gamma"] = (channels, *(1,) * dimensions)

    def block(self, name: str, channels: int, out: int) -> None:
        """Add a residual block; it has a shortcut if the channels change."""
        self.rms(f"{name}.norm1", channels)
        self.conv(f"{name}.conv1", channels, out, 3, 3, 3)
        self.rms(f"{name}.norm2", out)
        self.conv(f"{name}.conv2", out, out, 3, 3, 3)
        if channels != out:
            self.conv(f"{name}.conv_shortcut", channels, out, 1, 1, 1)

    def frame_attention(self, name: str, channels: int) -> None:
        """Add self-attention over the pixels of a frame."""
        self.rms(f"{name}.norm", channels, 2)
        self.conv(f"{name}.to_qkv", channels, 3 * channels, 1, 1)
        self.conv(f"{name}.proj", channels, channels, 1, 1)

    def resample(self, name: str, channels: int, out: int, frames: int | None) -> None:
        """Add a change of resolution.

        Args:
            name: The layer's name.
            channels: The number of channels.
            out: The number of channels after it.
            frames: The number of output channels of its convolution over frames; None if it has none.
        """
        self.conv(f"{name}.resample.1", channels, out, 3, 3)
        if frames is not None:
            self.conv(f"{name}.time_conv", channels, frames, 3, 1, 1)

    def ends(self, half: str, middle: int, width: int, out: int) -> None:
        """Add the middle of one half, and its last norm and convolution."""
        for n in range(2):
            self.block(f"{half}.mid_block.resnets.{n}", middle, middle)
        self.frame_attention(f"{half}.mid_block.attentions.0", middle)
        self.rms(f"{half}.norm_out", width)
        self.conv(f"{half}.conv_out", width, out, 3, 3, 3)


def wan_shapes(raw: Mapping[str, object]) -> TensorShapes | None:
    """Return the shape of every tensor of an AutoencoderKLWan, by published name.

    Args:
        raw: The content of its config.json.

    Returns:
        The shapes; None if there is no table for an option.

    Raises:
        RefusedOption: A value that the autoencoder cannot have.
    """
    options = known_options(raw, WAN_RULES, WITHOUT_EFFECT)
    return None if options is None else _shapes(options, options["in_channels"], options["out_channels"])


def qwen_image_shapes(raw: Mapping[str, object]) -> TensorShapes | None:
    """Return the shape of every tensor of an AutoencoderKLQwenImage, by published name.

    Args:
        raw: The content of its config.json.

    Returns:
        The shapes; None if there is no table for an option.

    Raises:
        RefusedOption: A value that the autoencoder cannot have.
    """
    options = known_options(raw, QWEN_IMAGE_RULES, WITHOUT_EFFECT)
    if options is None:
        return None
    absent = {"is_residual": False, "decoder_base_dim": None}
    return _shapes(options | absent, options["input_channels"], options["input_channels"])


def _shapes(options: Mapping[str, Any], pixels: int, pixels_out: int) -> TensorShapes:
    """Return the shapes, after a check of options that depend on one another."""
    _check_lengths(options)
    multiples, latent, residual = options["dim_mult"], options["z_dim"], options["is_residual"]
    over_time, count = options["temperal_downsample"], options["num_res_blocks"]
    down = [options["base_dim"] * times for times in (1, *multiples)]
    base = options["base_dim"] if options["decoder_base_dim"] is None else options["decoder_base_dim"]
    up = [base * times for times in (multiples[-1], *multiples[::-1])]
    encoder = Half("encoder", down, count, over_time, residual)
    decoder = Half("decoder", up, count + 1, over_time[::-1], residual)
    found = VideoShapes()
    found.conv("encoder.conv_in", pixels, down[0], 3, 3, 3)
    if residual:
        _check_shortcuts(encoder, decoder)
        _add_residual_levels(found, encoder)
    else:
        _add_down_layers(found, encoder, options["attn_scales"])
    found.ends("encoder", down[-1], down[-1], 2 * latent)
    found.conv("quant_conv", 2 * latent, 2 * latent, 1, 1, 1)
    found.conv("post_quant_conv", latent, latent, 1, 1, 1)
    found.conv("decoder.conv_in", latent, up[0], 3, 3, 3)
    if residual:
        _add_residual_levels(found, decoder)
    else:
        _add_up_levels(found, decoder)
    found.ends("decoder", up[0], up[-1], pixels_out)
    return found


def _check_lengths(options: Mapping[str, Any]) -> None:
    changes = len(options["dim_mult"]) - 1
    if len(options["temperal_downsample"]) < changes:
        raise RefusedOption(
            "temperal_downsample", options["temperal_downsample"], f"{changes} values, one less than dim_mult has"
        )
    for name in ("latents_mean", "latents_std"):
        if len(options[name]) != options["z_dim"]:
            raise RefusedOption(name, options[name], f"{options['z_dim']} numbers, as z_dim says")


def _check_shortcuts(encoder: Half, decoder: Half) -> None:
    """Refuse levels whose shortcut cannot average or repeat channels (is_residual=true)."""
    last = len(encoder.widths) - 2
    for half in (encoder, decoder):
        for level, (channels, out) in enumerate(zip(half.widths[:-1], half.widths[1:], strict=True)):
            pixels = 1 if level == last else 8 if half.over_time[level] else 4
            many, few = (channels * pixels, out) if half is encoder else (out * pixels, channels)
            if many % few and not (half is decoder and level == last):
                raise RefusedOption("is_residual", True, f"false: {channels} channels do not fit {out} ({half.name})")


def _add_down_layers(found: VideoShapes, half: Half, attention: Sequence[float]) -> None:
    """Add the levels of an encoder, whose layers are numbered through."""
    names = (f"encoder.down_blocks.{n}" for n in range(len(half.widths) * (2 * half.blocks + 1)))
    last = len(half.widths) - 2
    for level, out in enumerate(half.widths[1:]):
        for n in range(half.blocks):
            found.block(next(names), half.widths[level] if n == 0 else out, out)
            if 0.5**level in attention:
                found.frame_attention(next(names), out)
        if level < last:
            found.resample(next(names), out, out, out if half.over_time[level] else None)


def _add_up_levels(found: VideoShapes, half: Half) -> None:
    """Add the levels of a decoder; each change of resolution halves the channels."""
    last = len(half.widths) - 2
    for level, out in enumerate(half.widths[1:]):
        name, channels = f"decoder.up_blocks.{level}", half.widths[level] // 2 if level else half.widths[0]
        for n in range(half.blocks):
            found.block(f"{name}.resnets.{n}", channels if n == 0 else out, out)
        if level < last:
            found.resample(f"{name}.upsamplers.0", out, out // 2, 2 * out if half.over_time[level] else None)


def _add_residual_levels(found: VideoShapes, half: Half) -> None:
    """Add the levels of one half of Wan 2.2's autoencoder; their shortcuts have no tensors."""
    down, last = half.name == "encoder", len(half.widths) - 2
    for level, out in enumerate(half.widths[1:]):
        name = f"{half.name}.{'down' if down else 'up'}_blocks.{level}"
        for n in range(half.blocks):
            found.block(f"{name}.resnets.{n}", half.widths[level] if n == 0 else out, out)
        if level < last:
            resample = f"{name}.{'downsampler' if down else 'upsampler'}"
            found.resample(resample, out, out, (out if down else 2 * out) if half.over_time[level] else None)
