"""A tiny data set of squares with captions, the overrides of a tiny training, and what wandb reads back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.registry import REFERENCE

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (230, 220, 30)}
TINY = [
    "task=train",
    f"train.shared={REFERENCE / 'emoji'}",
    "train.data.recipe=null",
    "train.denoiser.width=16",
    "train.denoiser.depth=1",
    "train.denoiser.heads=2",
    "train.denoiser.loop.batch=4",
    "train.denoiser.loop.threads=1",
    "train.denoiser.loop.warmup=1",
    "train.score.steps=2",
]


def square(colour: tuple[int, int, int], size: int = 64) -> Image.Image:
    picture = np.full((size, size, 3), 255, np.uint8)
    picture[size // 8 : -size // 8, size // 8 : -size // 8] = colour
    return Image.fromarray(picture)


def captioned(folder: Path, size: int = 64) -> Path:
    """A picture and a text file beside it for each colour."""
    folder.mkdir(parents=True)
    for name, value in COLOURS.items():
        square(value, size).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} square\n")
    return folder


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    return captioned(tmp_path / "squares")


def offline_runs(folder: Path) -> list[Path]:
    """The logs of a folder's offline wandb runs, oldest first."""
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)


def summary_of(log: Path) -> dict[str, Any]:
    """State, configuration and summary of an offline run, as wandb itself reads them back."""
    program = Path(sys.executable).parent / "wandb"
    command = [str(program), "leet", "inspect", "--summary", "--json", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary
