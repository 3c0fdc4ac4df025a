"""Images and videos on disk: PNG and MP4 files with metadata, and a grid of images."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
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
CRF = 12  # x264's constant rate factor: 0 is lossless, and below 18 the loss is not visible
COLOUR = (  # bt709, converted and tagged: players differ in how they read an untagged video
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_inp+full_chroma_int,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)


def to_uint8(pixels: Array) -> NDArray[np.uint8]:
    """Convert float pixels (..., 3, H, W) in [0, 1] to 8-bit pixels (..., H, W, 3), rounded to nearest."""
    return (np.moveaxis(pixels, -3, -1) * 255.0).round().clip(0, 255).astype(np.uint8)


def pixel_hash(image: NDArray[np.uint8]) -> str:
    """Return the sha256 of 8-bit pixels; the frames of a video follow one another."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def save_png(path: Path, image: NDArray[np.uint8], text: dict[str, str]) -> None:
    """Write 8-bit pixels (H, W, 3), with `text` in the PNG's text chunks."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_itxt(key, value)
    with open(path, "wb", opener=open_private) as file:
        Image.fromarray(image).save(file, format="PNG", pnginfo=chunks)


def open_private(path: str, flags: int) -> int:
    """Open a file that others cannot read, as an opener of `open`."""
    return os.open(path, flags, 0o600)


def save_mp4(path: Path, video: NDArray[np.uint8], fps: int, text: dict[str, str]) -> None:
    """Write 8-bit frames (F, H, W, 3) as H.264 in yuv420p, with `text` in the file's metadata.

    Chroma is stored at half the size. So an odd side is made even by repeating its last row or column.

    Args:
        path: The file to write.
        video: 8-bit frames (F, H, W, 3).
        fps: Frames per second.
        text: Metadata of the file.

    Raises:
        ValueError: There is no ffmpeg.
        OSError: ffmpeg could not write the file.
    """
    height, width = video.shape[1:3]
    even = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    size = f"{even.shape[2]}x{even.shape[1]}"
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-")
    codec = ("-vf", COLOUR, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(CRF))
    tags = [part for key, value in text.items() for part in ("-metadata", f"{key}={value}".replace("\0", " "))]
    container = ("-movflags", "+use_metadata_tags+faststart", "-f", "mp4", str(path))
    open(path, "wb", opener=open_private).close()  # ffmpeg keeps the mode of a file that exists
    command = [ffmpeg(), "-y", "-v", "error", *source, *codec, *tags, *container]
    done = subprocess.run(command, input=even.tobytes(), capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise OSError(f"{path}: ffmpeg could not write the video ({said[-1]})")


def ffmpeg() -> str:
    """Return the path of the ffmpeg that writes videos.

    Returns:
        The path of the program.

    Raises:
        ValueError: There is none; the message has the line to install it.
    """
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        found: str = get_ffmpeg_exe()
    except (ImportError, RuntimeError) as missing:
        raise ValueError("videos are written by ffmpeg, which is not there: pip install 'triptych[video]'") from missing
    return found


def still(shown: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image unchanged, or the first, middle and last frame of a video (F, H, W, 3) side by side."""
    if shown.ndim == 3:
        return shown
    return np.concatenate([shown[0], shown[len(shown) // 2], shown[-1]], axis=1)


def grid(images: Sequence[NDArray[np.uint8]], captions: Sequence[str]) -> Image:
    """Lay out images with their prompts below on a near-square sheet.

    Small images are enlarged without smoothing away their pixels.

    Args:
        images: 8-bit images (H, W, 3) of one size.
        captions: The text below each image.

    Returns:
        The sheet.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images[0].shape[:2]
    scale = max(1, GRID_CELL // max(height, width))
    cell_w, cell_h = width * scale, height * scale
    sheet = Image.new("RGB", (GAP + columns * (cell_w + GAP), GAP + rows * (cell_h + CAPTION + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = GAP + (k % columns) * (cell_w + GAP)
        y = GAP + (k // columns) * (cell_h + CAPTION + GAP)
        sheet.paste(Image.fromarray(image).resize((cell_w, cell_h), Image.Resampling.BICUBIC), (x, y))
        caption = " ".join(caption.split())[:CAPTION_CHARS]
        while draw.textlength(caption, font=font) > cell_w and len(caption) > 1:
            caption = caption[:-2].rstrip() + "…"
        draw.text((x + cell_w / 2, y + cell_h + 2), caption, fill="#333333", font=font, anchor="ma")
    return sheet
