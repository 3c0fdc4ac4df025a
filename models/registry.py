"""What there is, as names, readable without importing torch: architectures, attention backends, shipped checkpoints."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

ARCHITECTURES: dict[str, str] = {"pixart": "models.pipelines.pixart"}
"""Architecture to the module whose `load(...)` builds its components (imported only when a rank needs it)."""

ATTENTION_BACKENDS = ("math", "sdpa", "flash")

REFERENCE = Path(__file__).parent / "reference"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name closest to `name`, or nothing when none is close."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def resolve_backend(requested: str) -> str:
    """The attention backend that `requested` stands for; `auto` is `sdpa`, PyTorch's own choice, which runs on every device.

    Raises:
        ValueError: an unknown name, with the nearest known one.
    """
    if requested == "auto":
        return "sdpa"
    if requested not in ATTENTION_BACKENDS:
        names = ", ".join(("auto", *ATTENTION_BACKENDS))
        raise ValueError(
            f"attention.backend={requested} is not a backend{nearest(requested, ATTENTION_BACKENDS)} Choose one of: {names}"
        )
    return requested


def checkpoint_folder(name: str, path: str | None) -> Path:
    """The folder of a checkpoint: `path` where the user gives one, else the one shipped under that name."""
    return Path(path).expanduser() if path is not None else REFERENCE / name
