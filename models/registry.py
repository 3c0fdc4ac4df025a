"""What there is, as names, readable without importing torch: architectures, attention backends, shipped checkpoints."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Architecture:
    """One row: the module whose `load(...)` builds the components, and the folders that a checkpoint of it has beside
    its denoiser's, of which it may have several: `weights` hold tensors, `configs` small files only.
    """

    module: str
    weights: tuple[str, ...]
    configs: tuple[str, ...]


ARCHITECTURES = {"dit": Architecture("models.dit.components", ("vae", "text_encoder"), ("tokenizer",))}

ATTENTION_BACKENDS = ("math", "sdpa", "flash")

REFERENCE = Path(__file__).parent / "reference"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name closest to `name`, or nothing when none is close."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def resolve_backend(requested: str) -> str:
    """The attention backend that `requested` stands for; `auto` is `sdpa`, PyTorch's own choice, which runs on every
    device.

    Raises:
        ValueError: an unknown name, with the nearest known one.
    """
    if requested == "auto":
        return "sdpa"
    if requested not in ATTENTION_BACKENDS:
        names = ", ".join(("auto", *ATTENTION_BACKENDS))
        raise ValueError(
            f"attention.backend={requested} is not a backend{nearest(requested, ATTENTION_BACKENDS)}. "
            f"Choose one of: {names}"
        )
    return requested


def checkpoint_folder(name: str, path: str | None) -> Path:
    """The folder of a checkpoint: `path` where the user gives one, else the one shipped under that name."""
    return Path(path).expanduser() if path is not None else REFERENCE / name
