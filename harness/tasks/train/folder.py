"""A data set: a folder of square RGB pictures with a caption each.

Either ``metadata.jsonl`` has a row a picture: ``file_name`` and ``caption``, and where there are any ``name`` (what it
shows; the caption when left out), ``style``, ``tags``, ``licence`` and ``vocabulary`` (false: only the VAE learns it).
Or every picture ``x.png`` (``.jpg``, ``.webp``) has its caption in ``x.txt`` beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class DataError(ValueError):
    """A folder that cannot be trained on, with what to change in one line."""


@dataclass(frozen=True)
class Picture:
    """One picture of the folder."""

    file_name: str
    name: str
    style: str
    tags: tuple[str, ...]
    caption: str
    licence: str
    vocabulary: bool


class Row(msgspec.Struct):
    """A line of ``metadata.jsonl`` as it may be written."""

    file_name: str
    caption: str
    name: str | None = None
    style: str | None = None
    tags: tuple[str, ...] = ()
    licence: str | None = None
    vocabulary: bool = True

    def picture(self) -> Picture:
        """With what is left out filled in."""
        name = self.name or self.caption
        return Picture(
            self.file_name, name, self.style or "", self.tags, self.caption, self.licence or "", self.vocabulary
        )


def read(folder: Path, size: int) -> list[Picture]:
    """The pictures of a folder: those of ``metadata.jsonl`` in its order, or all that lie there by name.

    Raises:
        DataError: no folder or no pictures; a picture that is missing, unreadable or not ``size`` pixels a side; a row
            that cannot be read; a picture without a caption.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; set train.data.folder, or train.data.recipe=emoji to build one")
    metadata = folder / "metadata.jsonl"
    found = list(_from_metadata(metadata) if metadata.exists() else _from_captions(folder))
    if not found:
        raise DataError(f"{folder}: no pictures; put {', '.join(PICTURES)} files there, with captions")
    for picture in found:
        _check(folder, picture, size)
    if not any(picture.vocabulary for picture in found):
        raise DataError(f"{metadata}: vocabulary is false in every row; the denoiser has nothing to learn")
    return found


def pixels(folder: Path, pictures: list[Picture]) -> np.ndarray:
    """The pictures as uint8 (N, H, W, 3); what is transparent becomes white."""
    return np.stack([_rgb(Image.open(folder / picture.file_name)) for picture in pictures])


def _from_metadata(path: Path) -> Iterator[Picture]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            picture = msgspec.json.decode(line, type=Row).picture()
        except msgspec.MsgspecError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        if not picture.caption.strip():
            raise DataError(f"{path}, line {number}: the caption of {picture.file_name} is empty; write one")
        yield picture


def _from_captions(folder: Path) -> Iterator[Picture]:
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES):
        caption = path.with_suffix(".txt")
        text = " ".join(caption.read_text(encoding="utf-8").split()) if caption.exists() else ""
        if not text:
            raise DataError(
                f"{path}: no caption; write one into {caption.name} beside it, or a metadata.jsonl for the folder"
            )
        yield Row(path.relative_to(folder).as_posix(), text).picture()


def _check(folder: Path, picture: Picture, size: int) -> None:
    path = folder / picture.file_name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder / 'metadata.jsonl'}: {picture.file_name} is outside the folder; move it inside")
    try:
        with Image.open(path) as image:
            found = image.size
    except OSError as error:
        raise DataError(
            f"{path}: not a readable picture ({type(error).__name__}); replace it or drop its row"
        ) from error
    if found != (size, size):
        raise DataError(
            f"{path} is {found[0]} x {found[1]} pixels, train.data.size={size} asks for {size} x {size}; resize it"
        )


def _rgb(image: Image.Image) -> np.ndarray:
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))
