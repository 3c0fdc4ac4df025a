"""An image decoder with channels-last convolutions, which oneDNN and cuDNN compute faster, and with fewer products."""

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
"""With fewer channels the transforms cost what the products save."""
MAX_LARGE_TILE_PAIRS = 256 * 512
"""Pairs of channels; with more, four times the weights are too many, and such layers occur where an image is small."""


def to_channels_last(decoder: Decoder) -> bool:
    """Store a decoder's weights channels last, in place; return whether the decoder has such weights."""
    if not isinstance(decoder, KLDecoder):
        return False
    decoder.vae.to(memory_format=torch.channels_last)
    return True


def apply_winograd(decoder: Decoder, upcast: bool = False) -> bool:
    """Replace a decoder's convolutions of many channels, and the upsamplings before them, by Winograd convolutions.

    Args:
        decoder: the decoder, on the CPU.
        upcast: whether to do so in bfloat16 too, if its products are computed in float32; others are less accurate.

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
    """Replace convolutions in place, and return how many were replaced."""
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
    """Return whether a module is a plain 3 x 3 convolution with many channels."""
    if not isinstance(conv, nn.Conv2d) or min(conv.in_channels, conv.out_channels) < MIN_CHANNELS:
        return False
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
