"""Previews: the solver's x0 estimate of a request's first image, decoded while the image denoises.

The state, the solver and the noise are not touched, so the final image is the same bit for bit.
"""

from __future__ import annotations

import io

import torch
from torch import Tensor
from torch.nn import functional as F

from models.components import Decoder

LONGEST_SIDE = 256  # pixels; a larger preview is made smaller


def preview_steps(steps: int, previews: int) -> frozenset[int]:
    """Return the numbers of finished steps after which a preview is made: evenly spread, none after the last step.

    Args:
        steps: the number of solver steps.
        previews: the number of previews; fewer are made if there are not as many steps before the last one.

    Returns:
        The numbers, from 1 to steps - 1.
    """
    spread = {round(k * steps / (previews + 1)) for k in range(1, previews + 1)}
    return frozenset(done for done in spread if 0 < done < steps)


def decode_preview(decoder: Decoder, x0: Tensor) -> Tensor:
    """Decode an x0 estimate to a small image; of a video, its first latent frame.

    Args:
        decoder: latents to pixels; all ranks that share it call this.
        x0: the estimate, (B, C, H, W) or (B, C, F, H, W); the first row is decoded.

    Returns:
        The pixels, (3, h, w) in [0, 1] on the CPU, with sides of LONGEST_SIDE at most.
    """
    first = x0[:1, :, :1] if x0.ndim == 5 else x0[:1]
    pixels = decoder(first)
    image = pixels[:, 0] if pixels.ndim == 5 else pixels
    height, width = image.shape[-2:]
    if (scale := LONGEST_SIDE / max(height, width)) < 1:
        image = F.interpolate(image, (max(1, round(scale * height)), max(1, round(scale * width))), mode="area")
    return image[0].nan_to_num().cpu()


def to_png(pixels: Tensor) -> bytes:
    """Return pixels (3, h, w) in [0, 1] as a PNG."""
    from PIL import Image

    image = (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, format="PNG", compress_level=1)
    return file.getvalue()
