"""A picture's decoder with the channels of its convolutions innermost, which is how oneDNN and cuDNN compute them, and
with fewer products in them.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from harness.optimize.upcast import should_upcast
from harness.optimize.winograd import WinogradConv2d
from models.components import Decoder
from models.decoders import KLDecoder

MIN_CHANNELS = 128
"""Of fewer, the transforms cost what the products save."""
MAX_LARGE_TILE_PAIRS = 256 * 512
"""Pairs of channels: more are too many weights to have four times, and are found where a picture is small."""


def to_channels_last(decoder: Decoder) -> bool:
    """Lays a decoder's weights out so, in place, and what it computes follows them; false where it has none of them."""
    if not isinstance(decoder, KLDecoder):
        return False
    decoder.vae.to(memory_format=torch.channels_last)
    return True


def apply_winograd(decoder: Decoder, upcast: bool = False) -> bool:
    """Puts Winograd's convolutions in the place of a decoder's wide ones, and of the upsamplings before them.

    Args:
        decoder: on the CPU.
        wide: also in bfloat16 where its products are float32's, in which alone they are as accurate.

    Returns:
        Whether there were any.
    """
    if not isinstance(decoder, KLDecoder):
        return False
    dtype = decoder.vae.dtype
    if dtype is not torch.float32 and not (upcast and should_upcast(decoder.vae.device, dtype)):
        return False
    return _replace_convolutions(decoder.vae.decoder) > 0


def _replace_convolutions(module: nn.Module) -> int:
    """In place; how many."""
    count = 0
    for name, child in module.named_children():
        if isinstance(child, Upsample2D) and child.interpolate and child.norm is None and _is_eligible(child.conv):
            setattr(module, name, WinogradConv2d(child.conv, step=1))
        elif _is_eligible(child):
            large = child.in_channels * child.out_channels <= MAX_LARGE_TILE_PAIRS
            setattr(module, name, WinogradConv2d(child, step=4 if large else 2))
        else:
            count += _replace_convolutions(child)
            continue
        count += 1
    return count


def _is_eligible(conv: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether it is a plain convolution of 3 x 3 with many channels."""
    if not isinstance(conv, nn.Conv2d) or min(conv.in_channels, conv.out_channels) < MIN_CHANNELS:
        return False
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
