"""Pictures on disk: PNGs that say what they are, and a grid to look at."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

    from harness.messages import Array

GRID_CELL = 128
CAPTION = 18
GAP = 8
FONT = 12
CAPTION_CHARS = 80


def to_uint8(pixels: Array) -> NDArray[np.uint8]:
    """Float pixels (3, H, W) in [0, 1] to 8-bit (H, W, 3), rounded to nearest."""
    return (pixels.transpose(1, 2, 0) * 255.0).round().clip(0, 255).astype(np.uint8)


def pixel_hash(picture: NDArray[np.uint8]) -> str:
    """sha256 of the 8-bit pixels."""
    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()


def save_png(path: Path, picture: NDArray[np.uint8], text: dict[str, str]) -> None:
    """Writes 8-bit pixels (H, W, 3), with `text` in the PNG's text chunks."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_itxt(key, value)
    Image.fromarray(picture).save(path, pnginfo=chunks)


def grid(pictures: Sequence[NDArray[np.uint8]], captions: Sequence[str]) -> Image:
    """A near-square sheet of pictures with their prompts below, small ones enlarged without smoothing away their
    pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    height, width = pictures[0].shape[:2]
    scale = max(1, GRID_CELL // max(height, width))
    cell_w, cell_h = width * scale, height * scale
    sheet = Image.new("RGB", (GAP + columns * (cell_w + GAP), GAP + rows * (cell_h + CAPTION + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for k, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = GAP + (k % columns) * (cell_w + GAP)
        y = GAP + (k // columns) * (cell_h + CAPTION + GAP)
        sheet.paste(Image.fromarray(picture).resize((cell_w, cell_h), Image.Resampling.BICUBIC), (x, y))
        caption = " ".join(caption.split())[:CAPTION_CHARS]
        while draw.textlength(caption, font=font) > cell_w and len(caption) > 1:
            caption = caption[:-2].rstrip() + "…"
        draw.text((x + cell_w / 2, y + cell_h + 2), caption, fill="#333333", font=font, anchor="ma")
    return sheet
