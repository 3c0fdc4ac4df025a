"""Bytes that a rank sends to decode one video by latent frames, by kind of collective, from shapes alone.

The single-device decoder is traced on the meta device. The letters are: N ranks, s bytes per element, u frames of
pixels per latent frame (the first latent frame of the video has one), and n_r latent frames on rank r. These are m_r =
u n_r frames of pixels, u - 1 fewer on the first rank (harness.parallel.frames). A rank sends

    for every convolution over time of x with F frames
        neighbours      2 s |x| / F                     two frames to the next rank; the last rank sends none
    for the pixels p, in float32
        all_gather      (4 |p| max m / m + 8) (N - 1)   frames padded to the longest part, and each part's length

where |x| is the number of elements, including the batch, and m = sum m_r. The first term does not grow with the video's
length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn

from harness.costs.traffic import FLOAT32
from harness.parallel.frames import is_temporal
from harness.parallel.mesh import TEMPORAL_HALO
from models.wan.decoder import WanDecoder

LENGTH = 8  # bytes of the frame count that each rank sends, an int64


@dataclass(frozen=True)
class FramesTrace:
    """The operations of decoding one batch of videos that make ranks communicate.

    Args:
        frames: the number of latent frames.
        stride: u, the frames of pixels for each latent frame but the first.
        halo_elements: the elements in the frames that each convolution over time receives from the previous rank.
        pixels: the elements in one frame of pixels.
    """

    frames: int
    stride: int
    halo_elements: tuple[int, ...]
    pixels: int


def frames_bytes(trace: FramesTrace, ranks: int, index: int, itemsize: int) -> dict[str, int]:
    """Return the bytes that one rank sends to decode once, by kind of collective; the last rank's "neighbours" is 0.

    Args:
        trace: the trace of the decoder and the latents.
        ranks: N, two or more.
        index: this rank's index among them.
        itemsize: s, the bytes per element of the decoder's dtype.
    """
    others, (share, spare) = ranks - 1, divmod(trace.frames, ranks)
    # parts as of tensor_split; `later` is the longest part after the first rank's
    first, later = share + (spare > 0), share + (spare > 1)
    longest = max(trace.stride * (first - 1) + 1, trace.stride * later)
    return {
        "neighbours": itemsize * sum(trace.halo_elements) * (index < others),
        "all_gather": (FLOAT32 * trace.pixels * longest + LENGTH) * others,
    }


def trace_frames(make: Callable[[], WanDecoder], latent: Tensor) -> FramesTrace:
    """Decode two latent frames on the meta device; the second is the first one that a decoder upsamples in time.

    Args:
        make: a function that builds the single-device decoder.
        latent: (B, C, F, H, W) with the shape in question, F >= 2, on any device (meta is enough).

    Returns:
        The trace.
    """
    with torch.device("meta"):
        decoder = make()
    halo_elements: dict[nn.Module, int] = {}

    def convolve(conv: nn.Module, args: tuple[Any, ...]) -> None:
        halo_elements[conv] = TEMPORAL_HALO * args[0].numel() // args[0].shape[2]

    for module in decoder.vae.decoder.modules():
        if isinstance(module, WanCausalConv3d) and is_temporal(module):
            module.register_forward_pre_hook(convolve)
    with torch.no_grad():
        pixels = decoder(latent[:, :, :TEMPORAL_HALO].to("meta"))
    return FramesTrace(latent.shape[2], pixels.shape[1] - 1, tuple(halo_elements.values()), pixels[:, :1].numel())
