"""Which files make a checkpoint, and whether they are whole: checked from headers alone, without torch.

A launcher asks here before it starts a process; `models.checkpoint` reads the tensors.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

STEMS = ("diffusion_pytorch_model", "model")
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
INDICES = {"I64": 8, "BOOL": 1}  # counters and positions that some checkpoints carry along; never a weight
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SENTENCEPIECE = ("spiece.model",)
TOKENIZER_FILES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    SENTENCEPIECE,
    ("tokenizer.model",),
    ("vocab.txt",),
)


class Entry(msgspec.Struct, frozen=True):
    """What the header of a safetensors file says of one tensor; the offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


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


def network_config(folder: Path, classes: tuple[str, ...], defaults: Mapping[str, object]) -> dict[str, Any]:
    """A network's config.json over the defaults of its class in diffusers.

    Args:
        folder: the component.
        classes: the `_class_name`s that a network loads.
        defaults: of the class, for what a file leaves out.

    Raises:
        CheckpointError: no such file, or another class.
    """
    path = folder / "config.json"
    found = read_json(path)
    if found.get("_class_name") not in classes:
        raise CheckpointError(
            f"{path}: _class_name is {found.get('_class_name')!r}, this network loads {' or '.join(classes)}"
        )
    return {**defaults, **found}


def refuse_sizes(raw: Mapping[str, object], path: Path, names: Iterable[str], least: int = 1) -> None:
    """Refuses sizes that are not whole numbers of at least `least`.

    Raises:
        CheckpointError: all that are not.
    """
    wrong = [name for name in names if type(size := raw.get(name)) is not int or size < least]
    if wrong:
        raise CheckpointError(f"{path}: no whole number under {', '.join(wrong)}")


def rotary_axes(raw: Mapping[str, Any], path: Path, name: str, channels: int) -> tuple[int, int, int]:
    """Channels of a head that each of three axes rotates.

    Raises:
        CheckpointError: not three even numbers that add up to a head's channels.
    """
    axes = tuple(raw[name])
    if len(axes) != 3 or any(axis % 2 for axis in axes) or sum(axes) != channels:
        raise CheckpointError(f"{path}: {name}={list(axes)}; give three even numbers that add up to {channels}")
    return axes


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


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file: where its bytes lie, and what they are.

    Args:
        path: the file.
        name: of the tensor.
        kind: the format's word for its dtype.
        shape: of the tensor.
        start: of its bytes in the file.
        end: behind its bytes.
    """

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


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
    raise CheckpointError(
        f"{folder}: no weights here; expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors{_near(folder)}"
    )


def has_weights(folder: Path) -> bool:
    """Whether a component's folder holds safetensors under a name that is read."""
    return any((folder / f"{stem}.safetensors{end}").is_file() for stem in STEMS for end in ("", ".index.json"))


def _near(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if others := [name for name in names if name.endswith(".safetensors")]:
        return f"; there is {others[0]}: give that file as the component's path, or rename it"
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return (
            f"; there is {pickles[0]}, a pickle, and pickles are never read: convert it once, where you trust it, with "
            "from_pretrained(DIR, use_safetensors=False).save_pretrained(DIR) of its class in diffusers or transformers"
        )
    return ""


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not a readable index of shards ({error})") from error
    if foreign := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{index}: {foreign[0]!r} is no file of its own folder")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        more = f" (nor are {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{index.parent}: shard {missing[0]} is named by {index.name} but is not there{more}")
    return [index.parent / name for name in names]


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file and its metadata: eight bytes of length, a JSON header, the tensors' bytes.

    Raises:
        CheckpointError: truncated, another format, or a dtype that is not read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: not a whole safetensors file (its header does not fit its {size} bytes)")
        data = file.read(length)
    try:
        header = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
        entries = {name: msgspec.json.decode(raw, type=Entry) for name, raw in header.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file (its header cannot be read)") from error
    base = 8 + length
    end = base + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if end != size:
        raise CheckpointError(f"{path}: {size} bytes where its header promises {end}; copy the file again")
    tensors = {
        name: Stored(path, name, entry.dtype, entry.shape, base + entry.data_offsets[0], base + entry.data_offsets[1])
        for name, entry in entries.items()
    }
    for tensor in tensors.values():
        _check_stored(tensor, base)
    return tensors, metadata


def _check_stored(tensor: Stored, base: int) -> None:
    width = FLOATS.get(tensor.kind) or INDICES.get(tensor.kind)
    if width is None:
        raise CheckpointError(
            f"{tensor.path}: {tensor.name} is stored as {tensor.kind}; quantised weights are not read here, give F32, "
            "F16 or BF16"
        )
    if min(tensor.start - base, *tensor.shape, 0) < 0 or tensor.end - tensor.start != width * math.prod(tensor.shape):
        raise CheckpointError(f"{tensor.path}: the bytes of {tensor.name} are not a {tensor.kind} {tensor.shape}")


def tensors_of(files: Sequence[Path]) -> dict[str, Stored]:
    """The tensors of a component's files, by name.

    Raises:
        CheckpointError: a file that is not whole, or a tensor that is in two of them.
    """
    found: dict[str, Stored] = {}
    for path in files:
        tensors, _ = read_header(path)
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(f"{path}: {twice[0]} is in {found[twice[0]].path.name} too")
        found |= tensors
    return found


def config_home(path: Path | None, own: Path) -> Path:
    """The folder that describes a component.

    Args:
        path: what replaces it: a folder, a file (which its folder describes where it has a config.json), or None.
        own: its folder in the checkpoint.
    """
    if path is None:
        return own
    if path.is_dir():
        return path
    return path.parent if (path.parent / "config.json").is_file() else own


def check_tokenizer(folder: Path) -> None:
    """Refuses a folder that holds no tokenizer, or one that no installed package reads.

    Raises:
        CheckpointError: the files that make one, or the package to install.
    """
    found = [names for names in TOKENIZER_FILES if all((folder / name).is_file() for name in names)]
    if not found:
        expected = ", or ".join(" and ".join(names) for names in TOKENIZER_FILES)
        raise CheckpointError(f"{folder}: no tokenizer's files here; expected {expected}")
    if found == [SENTENCEPIECE] and importlib.util.find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{folder}: {SENTENCEPIECE[0]} wants the package sentencepiece: pip install sentencepiece"
        )


def check_component(folder: Path, weights: Path | None, classes: tuple[str, ...] = ()) -> None:
    """Refuses a component without config.json, of another class, quantised, or one of whose files is not whole.

    Args:
        folder: with its config.json.
        weights: the folder of its weights, or one file of them; None for random weights.
        classes: the `_class_name`s it may have; empty for any.

    Raises:
        CheckpointError: what is missing, foreign or broken, and where.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no {'config.json here' if folder.is_dir() else 'such folder'}")
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if classes and name not in classes:
        raise CheckpointError(f"{folder}: config.json says _class_name={name}; this model wants {' or '.join(classes)}")
    if weights is None:
        return
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{folder}: quantised weights (quantization_config) are not read here; give BF16 or F32")
    tensors_of([weights] if weights.is_file() else weight_files(weights))
