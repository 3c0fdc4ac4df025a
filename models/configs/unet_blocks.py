"""The tensors of the blocks from which diffusers builds its UNets and AutoencoderKL; without torch.

Source: diffusers 0.42.1, models/unets/unet_2d_blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from models.configs.shapes import TensorShapes

RGB = 3  # the channels of the image that NCSN++ passes along beside its features
Attend = Callable[[str, int], None]


class BlockShapes(TensorShapes):
    """The shape of each tensor of a network of residual blocks.

    Args:
        time: The number of channels of the time embedding; None if no block receives one.
        scale_shift: Whether the time embedding scales features too (resnet_time_scale_shift=scale_shift).
    """

    def __init__(self, time: int | None = None, scale_shift: bool = False) -> None:
        super().__init__()
        self.time = time
        self.scale_shift = scale_shift

    def resnet(self, name: str, channels: int, out: int, shortcut: bool = False) -> None:
        """Add a residual block; it has a shortcut if the channels change, or if it is asked for."""
        self.norm(f"{name}.norm1", channels)
        self.conv(f"{name}.conv1", channels, out, 3, 3)
        if self.time is not None:
            self.linear(f"{name}.time_emb_proj", self.time, 2 * out if self.scale_shift else out)
        self.norm(f"{name}.norm2", out)
        self.conv(f"{name}.conv2", out, out, 3, 3)
        if shortcut or channels != out:
            self.conv(f"{name}.conv_shortcut", channels, out, 1, 1)

    def pixel_attention(self, name: str, channels: int, head_channels: int, norm: bool = True) -> None:
        """Add self-attention over pixels, with a group norm."""
        inner = channels // head_channels * head_channels
        if norm:
            self.norm(f"{name}.group_norm", channels)
        for part in ("to_q", "to_k", "to_v"):
            self.linear(f"{name}.{part}", channels, inner)
        self.linear(f"{name}.to_out.0", inner, channels)

    def text_transformer(
        self, name: str, channels: int, heads: int, context: int, depth: int, linear: bool, only_cross: bool
    ) -> None:
        """Add a transformer over pixels that attends to text.

        Args:
            name: The transformer's name.
            channels: The number of channels of a pixel.
            heads: The number of heads.
            context: The number of channels of a text token.
            depth: The number of blocks.
            linear: Whether the projections around the blocks are linear layers, not convolutions.
            only_cross: Whether the first attention of a block is to the text too.
        """
        inner = channels // heads * heads
        sides = () if linear else (1, 1)
        self.norm(f"{name}.norm", channels)
        self.conv(f"{name}.proj_in", channels, inner, *sides)
        for block in (f"{name}.transformer_blocks.{n}" for n in range(depth)):
            for norm in ("norm1", "norm2", "norm3"):
                self.norm(f"{block}.{norm}", inner)
            for attention, width in (("attn1", context if only_cross else inner), ("attn2", context)):
                self.linear(f"{block}.{attention}.to_q", inner, inner, bias=False)
                self.linear(f"{block}.{attention}.to_k", width, inner, bias=False)
                self.linear(f"{block}.{attention}.to_v", width, inner, bias=False)
                self.linear(f"{block}.{attention}.to_out.0", inner, inner)
            self.linear(f"{block}.ff.net.0.proj", inner, 8 * inner)  # the values and the gates of a GEGLU
            self.linear(f"{block}.ff.net.2", 4 * inner, inner)
        self.conv(f"{name}.proj_out", inner, channels, *sides)

    def level(self, name: str, kind: str, resnets: Sequence[tuple[int, int]], attend: Attend) -> None:
        """Add a level without its change of resolution.

        Args:
            name: The level's name.
            kind: The level's class in diffusers.
            resnets: The numbers of channels of each residual block, in and out.
            attend: What adds an attention layer of a name and a number of channels.
        """
        for n, (channels, out) in enumerate(resnets):
            self.resnet(f"{name}.resnets.{n}", channels, out)
            if "Attn" in kind and not (n and kind == "AttnSkipUpBlock2D"):
                attend(f"{name}.attentions.{n}", out)

    def downsample(self, name: str, kind: str, channels: int, resnet: bool = False) -> None:
        """Add what halves the resolution: a convolution, or a residual block; and NCSN++'s path of the image."""
        if "Skip" in kind:
            self.resnet(f"{name}.resnet_down", channels, channels, shortcut=True)
            self.conv(f"{name}.skip_conv", RGB, channels, 1, 1)
        elif resnet:
            self.resnet(f"{name}.downsamplers.0", channels, channels)
        else:
            self.conv(f"{name}.downsamplers.0.conv", channels, channels, 3, 3)

    def upsample(self, name: str, kind: str, channels: int, resnet: bool = False) -> None:
        """Add what doubles the resolution: a convolution, or a residual block; and NCSN++'s path of the image."""
        if "Skip" in kind:
            self.resnet(f"{name}.resnet_up", channels, channels, shortcut=True)
            self.conv(f"{name}.skip_conv", channels, RGB, 3, 3)
            self.norm(f"{name}.skip_norm", channels)
        elif resnet:
            self.resnet(f"{name}.upsamplers.0", channels, channels)
        else:
            self.conv(f"{name}.upsamplers.0.conv", channels, channels, 3, 3)


def down_channels(widths: Sequence[int], level: int, count: int) -> list[tuple[int, int]]:
    """Return the channels, in and out, of the residual blocks of a level on the way down."""
    before, out = widths[max(level - 1, 0)], widths[level]
    return [(before if n == 0 else out, out) for n in range(count)]


def up_channels(widths: Sequence[int], level: int, count: int) -> list[tuple[int, int]]:
    """Return the same on the way up, where each block reads what a block of the way down wrote.

    Args:
        widths: The channels of the levels, from the highest resolution.
        level: The level, counted from the lowest resolution.
        count: The number of residual blocks.
    """
    up = list(reversed(widths))
    before, out, skipped = up[max(level - 1, 0)], up[level], up[min(level + 1, len(up) - 1)]
    return [((before if n == 0 else out) + (skipped if n == count - 1 else out), out) for n in range(count)]
