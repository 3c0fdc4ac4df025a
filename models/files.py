"""Which files make a checkpoint, and whether they are whole: checked from headers alone, without torch.

A launcher asks here before it starts a process; `models.checkpoint` reads the tensors.
"""

from __future__ import annotations

import json
from pathlib import Path

STEMS = ("diffusion_pytorch_model", "model")
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with what to change in one line."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component's folder: one, or the shards that its index names.

    Raises:
        CheckpointError: none there, an unreadable index, or a shard that the index names is missing.
    """
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _shards(index)
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return [single]
    raise CheckpointError(f"{folder}: no weights here; expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a readable index of shards ({error})") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent}: shard {missing[0]} is named by {index.name} but is not there")
    return [index.parent / name for name in names]


def check_whole(path: Path) -> None:
    """Refuses a file that is not a whole safetensors file: eight bytes of length, a JSON header, the tensors' bytes.

    Raises:
        CheckpointError: truncated, or another format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: not a whole safetensors file (its header does not fit its {size} bytes)")
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a safetensors file (its header cannot be read)") from error
    if 8 + length + end != size:
        raise CheckpointError(f"{path}: {size} bytes where its header promises {8 + length + end}; copy the file again")


def check_checkpoint(
    folder: Path, weights: tuple[str, ...], configs: tuple[str, ...], weights_needed: bool = True
) -> None:
    """Refuses a checkpoint folder that lacks a component, or one of whose weight files is not whole.

    Args:
        folder: the checkpoint, in the diffusers layout.
        weights: names of the components with weights (each with a config.json).
        configs: names of the folders that hold only small files (a tokenizer).
        weights_needed: false for random weights, which need the configs alone.

    Raises:
        CheckpointError: what is missing or broken, and where.
    """
    if not folder.is_dir():
        raise CheckpointError(f"model.path={folder}: no such folder; give a checkpoint in the diffusers layout")
    for name in (*weights, *configs):
        if not (folder / name).is_dir():
            raise CheckpointError(f"{folder}: no {name}/ here; expected the folders {', '.join((*weights, *configs))}")
    for name in weights:
        if not (folder / name / "config.json").is_file():
            raise CheckpointError(f"{folder / name}: no config.json here")
        for path in weight_files(folder / name) if weights_needed else []:
            check_whole(path)
