"""How many bytes a rank sends to decode one video by latent frames, by kind of collective, from shapes alone.

The decoder as it was written for one device is traced on the meta device. On N ranks, with s bytes a number,
u frames of pixels for a latent frame (the first of the video has one), and n_r latent frames on rank r, which are
m_r = u n_r of pixels, u - 1 fewer on the first (harness.parallel.frames), a rank sends

    for every convolution over time of x of F frames
        neighbours      2 s |x| / F                     two frames to the next rank; the last one sends none
    for the pixels p, in float32
        all_gather      (4 |p| max m / m + 8) (N - 1)   frames padded to the longest, and how many each has

where |x| counts numbers, the batch's included, and m = sum m_r. Nothing of the first grows with the video's length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn

from harness.costs.traffic import FLOAT32
from harness.parallel.frames import over_time
from harness.parallel.mesh import REACH
from models.wan.decoder import WanDecoder

LENGTH = 8  # bytes of a number of frames, where those are told


@dataclass(frozen=True)
class FramesTrace:
    """What decoding one batch of videos does that ranks send bytes for.

    Args:
        frames: of the latent.
        stride: u, frames of pixels for each latent frame but the first.
        before: of every convolution over time: numbers in the frames that it gets from the rank before.
        pixels: numbers in a frame of them.
    """

    frames: int
    stride: int
    halo_elements: tuple[int, ...]
    pixels: int


def frames_bytes(trace: FramesTrace, ranks: int, index: int, itemsize: int) -> dict[str, int]:
    """Bytes that one rank sends to decode once, by kind of collective; the last is one of the neighbours and sends 0.

    Args:
        trace: of the decoder and the latents.
        ranks: N, two or more.
        index: of this rank among them.
        item: s, bytes of a number of the decoder's dtype.
    """
    others, (share, spare) = ranks - 1, divmod(trace.frames, ranks)
    first, later = share + (spare > 0), share + (spare > 1)  # those of tensor_split, and the longest behind the first
    longest = max(trace.stride * (first - 1) + 1, trace.stride * later)
    return {
        "neighbours": itemsize * sum(trace.halo_elements) * (index < others),
        "all_gather": (FLOAT32 * trace.pixels * longest + LENGTH) * others,
    }


def trace_frames(make: Callable[[], WanDecoder], latent: Tensor) -> FramesTrace:
    """Decodes two latent frames without any numbers: the second is the first one that doubles in time.

    Args:
        make: builds the decoder, for one device.
        latent: (B, C, F, H, W) of the sizes in question, F >= 2, on any device (meta is enough).
    """
    with torch.device("meta"):
        decoder = make()
    halo_elements: dict[nn.Module, int] = {}

    def convolve(conv: nn.Module, args: tuple[Any, ...]) -> None:
        halo_elements[conv] = REACH * args[0].numel() // args[0].shape[2]

    for module in decoder.vae.decoder.modules():
        if isinstance(module, WanCausalConv3d) and over_time(module):
            module.register_forward_pre_hook(convolve)
    with torch.no_grad():
        pixels = decoder(latent[:, :, :REACH].to("meta"))
    return FramesTrace(latent.shape[2], pixels.shape[1] - 1, tuple(halo_elements.values()), pixels[:, :1].numel())
