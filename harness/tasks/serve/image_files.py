"""The formats in which clients get images: PNG, JPEG and WebP."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from harness.tasks.serve.openai import ImageFormat

if TYPE_CHECKING:
    from PIL.Image import Image

MEDIA_TYPES: Mapping[str, str] = MappingProxyType(
    {".png": "image/png", ".jpeg": "image/jpeg", ".webp": "image/webp", ".mp4": "video/mp4"}
)
"""The media type of a sample's file, by its suffix."""
DESCRIPTION = 0x010E  # the EXIF tag ImageDescription


@dataclass(frozen=True)
class ImageEncoding:
    """How images are written.

    Attributes:
        format: The format.
        quality: The quality of JPEG and WebP, percent.
    """

    format: ImageFormat = "png"
    quality: int = 100

    def encode(self, image: NDArray[np.uint8], text: Mapping[str, str]) -> bytes:
        """Return 8-bit pixels (H, W, 3) as a file.

        Args:
            image: The pixels.
            text: What the file says of its image: in a PNG's text chunks, else in the EXIF description.
        """
        from PIL import Image

        return self._encode(Image.fromarray(image), text)

    def convert(self, png: bytes) -> bytes:
        """Return a PNG in this format."""
        from PIL import Image

        return png if self.format == "png" else self._encode(Image.open(io.BytesIO(png)), {})

    def _encode(self, image: Image, text: Mapping[str, str]) -> bytes:
        from PIL.PngImagePlugin import PngInfo

        file = io.BytesIO()
        if self.format == "png":
            chunks = PngInfo()
            for key, value in text.items():
                chunks.add_itxt(key, value)
            image.save(file, format="PNG", pnginfo=chunks)
            return file.getvalue()
        exif = image.getexif()
        if text:
            exif[DESCRIPTION] = "\n".join(f"{key}: {value}" for key, value in text.items()).encode()
        subsampling = {"subsampling": 0} if self.format == "jpeg" and self.quality == 100 else {}
        image.save(file, format=self.format.upper(), quality=self.quality, exif=exif, **subsampling)
        return file.getvalue()


PNG = ImageEncoding()
