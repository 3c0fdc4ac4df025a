"""Which files make a checkpoint, and whether they are whole: checked from headers alone, without torch.

A launcher asks here before it starts a process; `models.checkpoint` reads the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

STEMS = ("diffusion_pytorch_model", "model")
FLOATS = {"F64", "F32", "F16", "BF16"}
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with what to change in one line."""


def read_json(path: Path) -> dict[str, object]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: no such file, or other content.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def refuse_options(raw: Mapping[str, object], path: Path, only: Mapping[str, object]) -> None:
    """Refuses a configuration that states another value of an option than the only one a network has.

    Args:
        raw: the configuration; what it leaves out has that value.
        path: its file.
        only: by name, the value that is computed.

    Raises:
        CheckpointError: the options that differ.
    """
    others = [name for name, value in only.items() if raw.get(name, value) != value]
    if others:
        stated = ", ".join(f"{name}={raw[name]}" for name in others)
        raise CheckpointError(f"{path}: {stated} is not supported; only {', '.join(f'{n}={only[n]}' for n in others)}")


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
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            kinds = {entry["dtype"]: name for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a safetensors file (its header cannot be read)") from error
    if 8 + length + end != size:
        raise CheckpointError(f"{path}: {size} bytes where its header promises {8 + length + end}; copy the file again")
    for kind in kinds.keys() - FLOATS:
        raise CheckpointError(
            f"{path}: {kinds[kind]} is stored as {kind}, which is not read here; give weights in F32, F16 or BF16"
        )


def check_component(folder: Path, weights: Path | None, classes: tuple[str, ...] = ()) -> None:
    """Refuses a component without config.json, of another class, or one of whose weight files is not whole.

    Args:
        folder: with its config.json.
        weights: the folder of its weights, or one file of them; None for random weights.
        classes: the `_class_name`s it may have; empty for any.

    Raises:
        CheckpointError: what is missing, foreign or broken, and where.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no {'config.json here' if folder.is_dir() else 'such folder'}")
    name = read_json(folder / "config.json").get("_class_name")
    if classes and name not in classes:
        raise CheckpointError(f"{folder}: config.json says _class_name={name}; this model wants {' or '.join(classes)}")
    if weights is not None:
        for path in [weights] if weights.is_file() else weight_files(weights):
            check_whole(path)
