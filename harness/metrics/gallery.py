"""The gallery: the training images of a small model in compressed form, which can be shipped where the images cannot.

Images are averaged to 32 x 32 pixels x and projected on the first principal components of the training images,
``z = (x - mean) basis^T``. The file (safetensors, about half a megabyte) holds mean, basis and z with the name and
style of each row. 64 numbers per image are enough to recognize it, not to restore it. It needs only numpy, so that a
client can read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FILE = "gallery.safetensors"
SIDE = 32  # pixels per side of the projected images

Floats = NDArray[np.floating]


class GalleryError(ValueError):
    """A gallery or an image that cannot be used; the message has one line."""


@dataclass(frozen=True)
class Gallery:
    """Training images in principal components.

    Attributes:
        mean: Mean of the small images in [0, 1], (3072,).
        basis: Principal components, rows of unit length, (k, 3072).
        z: Components of the training images, (N, k).
        names: Name of each row.
        styles: Style of each row.
        digest: First 16 digits of the file's sha256; empty for a gallery that was not read from a file.
    """

    mean: Floats
    basis: Floats
    z: Floats
    names: tuple[str, ...]
    styles: tuple[str, ...]
    digest: str = ""

    @classmethod
    def build(
        cls, pixels: NDArray[np.uint8], names: Sequence[str], styles: Sequence[str], components: int = 64
    ) -> Gallery:
        """Build the gallery of uint8 images.

        mean and basis are rounded to float16, as in the file, before z is computed. So a gallery is the same before and
        after it is written.

        Args:
            pixels: Images (N, H, W, 3); H and W are multiples of 32.
            names: Name of each image.
            styles: Style of each image.
            components: Number of principal components.

        Returns:
            The gallery.
        """
        x = small(pixels)
        mean = x.mean(axis=0)
        basis = np.linalg.svd(x - mean, full_matrices=False)[2][:components].astype(np.float16)
        empty = cls(mean.astype(np.float16), basis, np.empty((0, len(basis))), tuple(names), tuple(styles))
        return cls(empty.mean, basis, empty.project(pixels).astype(np.float32), empty.names, empty.styles)

    def save(self, path: Path) -> None:
        """Write the safetensors file; names and styles are JSON in its metadata."""
        from safetensors.numpy import save_file

        words = {"names": json.dumps(self.names), "styles": json.dumps(self.styles)}
        save_file({"mean": self.mean, "basis": self.basis, "z": self.z}, path, metadata=words)

    @classmethod
    def load(cls, path: Path) -> Gallery:
        """Read what `save` wrote.

        Args:
            path: The safetensors file.

        Returns:
            The gallery.

        Raises:
            GalleryError: The file is incomplete or no gallery.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                words = file.metadata() or {}
                mean, basis, z = (file.get_tensor(key) for key in ("mean", "basis", "z"))
            names, styles = (tuple(json.loads(words[key])) for key in ("names", "styles"))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise GalleryError(f"{path} is not a readable gallery ({error})") from error
        if mean.shape != (3 * SIDE**2,) or basis.shape[1:] != mean.shape or z.shape != (len(names), len(basis)):
            raise GalleryError(f"{path} is not a gallery: mean {mean.shape}, basis {basis.shape}, rows {z.shape}")
        if len(styles) != len(names) or len(set(names)) < 2:
            raise GalleryError(f"{path} is not a gallery: {len(styles)} styles for {len(names)} names")
        return cls(mean, basis, z, names, styles, hashlib.sha256(path.read_bytes()).hexdigest()[:16])

    def project(self, pixels: NDArray[np.uint8]) -> Floats:
        """Return the components of uint8 images.

        Args:
            pixels: Images (M, H, W, 3).

        Returns:
            Components (M, k).

        Raises:
            GalleryError: H or W is not a multiple of 32.
        """
        return (small(pixels) - self.mean.astype(np.float64)) @ self.basis.astype(np.float64).T

    def distances(self, z: Floats) -> Floats:
        """Return the Euclidean distances (M, N) of components (M, k) to the rows."""
        a, b = z.astype(np.float64), self.z.astype(np.float64)
        square = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2.0 * a @ b.T
        return np.sqrt(np.maximum(square, 0.0))

    def nearest(self, pixels: NDArray[np.uint8], count: int = 5) -> NDArray[np.intp]:
        """Return the indices (M, count) of the nearest rows, nearest first."""
        return np.argsort(self.distances(self.project(pixels)), axis=1)[:, :count]

    def matches(self, name: str, style: str | None) -> NDArray[np.bool_]:
        """Return which rows (N,) show this name, in this style if one is given."""
        named = np.array(self.names) == name
        return named if style is None else named & (np.array(self.styles) == style)

    @cached_property
    def spacing(self) -> float:
        """The median distance of a row to the nearest row of another name."""
        names = np.array(self.names)
        others = np.where(names[:, None] == names[None], np.inf, self.distances(self.z))
        return float(np.median(others.min(axis=1)))


def small(pixels: NDArray[np.uint8]) -> Floats:
    """Average uint8 images to 32 x 32 pixels and flatten them.

    Args:
        pixels: Images (M, H, W, 3).

    Returns:
        The flat images in [0, 1], (M, 3072).

    Raises:
        GalleryError: H or W is not a multiple of 32.
    """
    count, height, width, channels = pixels.shape
    if height % SIDE or width % SIDE or not height or not width:
        raise GalleryError(f"images of {height} x {width} pixels are not multiples of {SIDE} per side")
    blocks = pixels.reshape(count, SIDE, height // SIDE, SIDE, width // SIDE, channels)
    return blocks.mean(axis=(2, 4)).reshape(count, -1) / 255.0
