"""A data set: a folder of square RGB images, each with a caption.

Either ``metadata.jsonl`` has one row per image: ``file_name`` and ``caption``, and optionally ``name`` (the subject;
by default the caption), ``style``, ``tags``, ``licence`` and ``vocabulary`` (false: only the VAE learns the image).
Or every image ``x.png`` (``.jpg``, ``.webp``) has its caption in ``x.txt`` beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class DataError(ValueError):
    """The folder cannot be trained on; the message says in one line what to change."""


@dataclass(frozen=True)
class CaptionedImage:
    """One image of the data set.

    Attributes:
        file_name: Path of the image file, relative to the folder.
        name: Subject of the image.
        style: Style, or empty.
        tags: Further words for the subject.
        caption: Full caption.
        licence: Licence of the image, or empty.
        vocabulary: Whether the denoiser learns the image, and not only the VAE.
    """

    file_name: str
    name: str
    style: str
    tags: tuple[str, ...]
    caption: str
    licence: str
    vocabulary: bool


class MetadataRow(msgspec.Struct):
    """One line of ``metadata.jsonl``, with optional keys; the keys are those of `CaptionedImage`."""

    file_name: str
    caption: str
    name: str | None = None
    style: str | None = None
    tags: tuple[str, ...] = ()
    licence: str | None = None
    vocabulary: bool = True

    def captioned(self) -> CaptionedImage:
        """Return the image with defaults for the keys that are left out."""
        name = self.name or self.caption
        return CaptionedImage(
            self.file_name, name, self.style or "", self.tags, self.caption, self.licence or "", self.vocabulary
        )


def read_folder(folder: Path, size: int) -> list[CaptionedImage]:
    """List the images of a data set, in the order of ``metadata.jsonl`` or of their names, and check them.

    Args:
        folder: Folder of the data set.
        size: Required width and height in pixels.

    Returns:
        The images.

    Raises:
        DataError: The folder or its images are missing. An image is missing, unreadable, of another size or without a
            caption. A row cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; set train.data.folder, or train.data.recipe=emoji to build one")
    metadata = folder / "metadata.jsonl"
    found = list(_from_metadata(metadata) if metadata.exists() else _from_captions(folder))
    if not found:
        raise DataError(f"{folder}: no images; put {', '.join(IMAGE_SUFFIXES)} files there, with captions")
    for captioned in found:
        _check(folder, captioned, size)
    if not any(captioned.vocabulary for captioned in found):
        raise DataError(f"{metadata}: vocabulary is false in every row; the denoiser has nothing to learn")
    return found


def load_pixels(folder: Path, images: list[CaptionedImage]) -> np.ndarray:
    """Load the images as uint8 (N, H, W, 3); transparent pixels become white."""
    return np.stack([_to_rgb(Image.open(folder / captioned.file_name)) for captioned in images])


def _from_metadata(path: Path) -> Iterator[CaptionedImage]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            captioned = msgspec.json.decode(line, type=MetadataRow).captioned()
        except msgspec.MsgspecError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        if not captioned.caption.strip():
            raise DataError(f"{path}, line {number}: the caption of {captioned.file_name} is empty; write one")
        yield captioned


def _from_captions(folder: Path) -> Iterator[CaptionedImage]:
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
        caption = path.with_suffix(".txt")
        text = " ".join(caption.read_text(encoding="utf-8").split()) if caption.exists() else ""
        if not text:
            raise DataError(
                f"{path}: no caption; write one into {caption.name} beside it, or a metadata.jsonl for the folder"
            )
        yield MetadataRow(path.relative_to(folder).as_posix(), text).captioned()


def _check(folder: Path, captioned: CaptionedImage, size: int) -> None:
    path = folder / captioned.file_name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder / 'metadata.jsonl'}: {captioned.file_name} is outside the folder; move it inside")
    try:
        with Image.open(path) as image:
            found = image.size
    except OSError as error:
        raise DataError(f"{path}: not a readable image ({type(error).__name__}); replace it or drop its row") from error
    if found != (size, size):
        raise DataError(
            f"{path} is {found[0]} x {found[1]} pixels, train.data.size={size} asks for {size} x {size}; resize it"
        )


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))
