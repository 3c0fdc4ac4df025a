"""The files of a checkpoint, and checks that they are complete, from their headers alone and without torch.

A launcher calls these checks before it starts a process; `models.checkpoint` reads the tensors.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

STEMS = ("diffusion_pytorch_model", "model")
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
MAX_LISTED = 6
Shape = tuple[int, ...]
INDICES = {"I64": 8, "I32": 4, "BOOL": 1}  # counters and positions that some checkpoints contain; never a weight
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
LFS_POINTER = b"version https://git-lfs"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
CONVERT = (
    "convert it once, where you trust it, with from_pretrained(DIR, use_safetensors=False).save_pretrained(DIR) of its "
    "class in diffusers or transformers"
)
INDEX = re.compile(r".*\.safetensors\.index(\.[\w-]+)?\.json")  # transformers puts a variant's name after `index`
SENTENCEPIECE = ("spiece.model",)
TOKENIZER_FILES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    SENTENCEPIECE,
    ("tokenizer.model",),
    ("vocab.txt",),
)


class TensorEntry(msgspec.Struct, frozen=True):
    """The header entry of one tensor in a safetensors file; the offsets count from the end of the header, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says what to change in one line."""


def check_not_pointer(path: Path) -> None:
    """Raise an error for the text that git keeps in place of a large file until git-lfs fetches it.

    Raises:
        CheckpointError: The command that fetches it.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(f"{path}: a pointer of git-lfs, not the file; run `git lfs pull` in its folder")


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON file that holds an object.

    Returns:
        The object.

    Raises:
        CheckpointError: No such file, or other content.
    """
    check_not_pointer(path)
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def read_network_config(folder: Path, classes: tuple[str, ...], defaults: Mapping[str, object]) -> dict[str, Any]:
    """Read a network's config.json over the defaults of its class in diffusers.

    Args:
        folder: The component's folder.
        classes: The values of `_class_name` that the network accepts.
        defaults: The defaults of the class, for keys that the file omits.

    Returns:
        The configuration.

    Raises:
        CheckpointError: No such file, or another class.
    """
    path = folder / "config.json"
    found = read_json(path)
    if found.get("_class_name") not in classes:
        raise CheckpointError(
            f"{path}: _class_name is {found.get('_class_name')!r}, this network loads {' or '.join(classes)}"
        )
    return {**defaults, **found}


def check_sizes(raw: Mapping[str, object], path: Path, names: Iterable[str], least: int = 1) -> None:
    """Raise an error unless the named sizes are integers of at least `least`.

    Raises:
        CheckpointError: All sizes that are not.
    """
    wrong = [name for name in names if type(size := raw.get(name)) is not int or size < least]
    if wrong:
        raise CheckpointError(f"{path}: no whole number under {', '.join(wrong)}")


def check_numbers(raw: Mapping[str, object], path: Path, names: Iterable[str]) -> None:
    """Raise an error unless the named options that a configuration has are finite numbers above 0.

    Raises:
        CheckpointError: All options that are not.
    """
    wrong = [name for name in names if name in raw and not _is_positive(raw[name])]
    if wrong:
        raise CheckpointError(f"{path}: no number above 0 under {', '.join(wrong)}")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def check_lists(raw: Mapping[str, object], path: Path, names: Iterable[str]) -> None:
    """Raise an error unless the named options are lists of whole numbers.

    Raises:
        CheckpointError: All options that are not.
    """
    wrong = [
        name
        for name in names
        if not isinstance(value := raw.get(name), list | tuple) or any(type(number) is not int for number in value)
    ]
    if wrong:
        raise CheckpointError(f"{path}: no list of whole numbers under {', '.join(wrong)}")


def rotary_axes(raw: Mapping[str, Any], path: Path, name: str, channels: int) -> tuple[int, int, int]:
    """Return the number of channels of a head that each of three axes rotates.

    Raises:
        CheckpointError: The values are not three even numbers that add up to a head's channels.
    """
    check_lists(raw, path, (name,))
    axes = tuple(raw[name])
    if len(axes) != 3 or any(axis % 2 for axis in axes) or sum(axes) != channels:
        raise CheckpointError(f"{path}: {name}={list(axes)}; give three even numbers that add up to {channels}")
    return axes


def check_options(raw: Mapping[str, object], path: Path, only: Mapping[str, object]) -> None:
    """Raise an error if a configuration has an option at another value than the only one the network supports.

    Args:
        raw: The configuration; an option that it omits has the supported value.
        path: The configuration's file.
        only: The supported value of each option, by name.

    Raises:
        CheckpointError: The options that differ.
    """
    unsupported = [name for name, value in only.items() if raw.get(name, value) != value]
    if unsupported:
        stated = ", ".join(f"{name}={raw[name]}" for name in unsupported)
        raise CheckpointError(
            f"{path}: {stated} is not supported; only {', '.join(f'{n}={only[n]}' for n in unsupported)}"
        )


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: its dtype and shape, and the position of its bytes.

    Args:
        path: The file.
        name: The tensor's name.
        dtype: The dtype in the format's own word, such as BF16.
        shape: The tensor's shape.
        start: The offset of the first byte in the file.
        end: The offset after the last byte in the file.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def component_files(weights: Path) -> list[Path]:
    """Return the safetensors files of a component.

    Args:
        weights: The component's folder, one file of weights, or an index of shards.

    Returns:
        One file, or every shard.

    Raises:
        CheckpointError: No weights, an unreadable index, or a shard of the index that is missing.
    """
    if not weights.is_file():
        return weight_files(weights)
    return _shard_files(weights) if INDEX.fullmatch(weights.name) else [weights]


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a component's folder: one file, or the shards that its index lists.

    Raises:
        CheckpointError: No weights, an unreadable index, or a shard of the index that is missing.
    """
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _shard_files(index)
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return [single]
    raise CheckpointError(
        f"{folder}: no weights here; expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors{_hint(folder)}"
    )


def has_weights(folder: Path) -> bool:
    """Return whether a component's folder holds safetensors under a supported name."""
    return any((folder / f"{stem}.safetensors{end}").is_file() for stem in STEMS for end in ("", ".index.json"))


def _hint(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if indices := [name for name in names if INDEX.fullmatch(name)]:
        return f"; there is {indices[0]}: give that file as the component's path"
    if others := [name for name in names if name.endswith(".safetensors")]:
        return f"; there is {others[0]}: give that file as the component's path, or rename it"
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return f"; there is {pickles[0]}, a pickle, and pickles are never read: {CONVERT}"
    return ""


def _shard_files(index: Path) -> list[Path]:
    check_not_pointer(index)
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not a readable index of shards ({error})") from error
    if not names:
        raise CheckpointError(f"{index}: it lists no tensor (weight_map is empty); copy the checkpoint's index again")
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{index}: {outside[0]!r} is not a file in the folder of the index")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        more = f" (nor are {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{index.parent}: shard {missing[0]} is named by {index.name} but is not there{more}")
    return [index.parent / name for name in names]


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    The format is eight bytes of length, a JSON header, and the tensors' bytes.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        CheckpointError: A truncated file, another format, or a dtype that is not supported.
    """
    check_not_pointer(path)
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path}: a pickle, and pickles are never read; give a safetensors file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: not a complete safetensors file (its header does not fit its {size} bytes)")
        data = file.read(length)
    try:
        header = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
        entries = {name: msgspec.json.decode(raw, type=TensorEntry) for name, raw in header.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file (its header cannot be read)") from error
    base = 8 + length
    end = base + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if end != size:
        raise CheckpointError(f"{path}: {size} bytes where its header promises {end}; copy the file again")
    tensors = {
        name: StoredTensor(
            path, name, entry.dtype, entry.shape, base + entry.data_offsets[0], base + entry.data_offsets[1]
        )
        for name, entry in entries.items()
    }
    for tensor in tensors.values():
        _check_stored(tensor, base)
    return tensors, metadata


def _check_stored(tensor: StoredTensor, base: int) -> None:
    width = FLOATS.get(tensor.dtype) or INDICES.get(tensor.dtype)
    if width is None or (tensor.dtype == "I32" and math.prod(tensor.shape) != 1):  # a LoRA's alpha is one number
        raise CheckpointError(
            f"{tensor.path}: {tensor.name} is stored as {tensor.dtype}; quantised weights are not read here, give F32, "
            "F16 or BF16"
        )
    if min(tensor.start - base, *tensor.shape, 0) < 0 or tensor.end - tensor.start != width * math.prod(tensor.shape):
        raise CheckpointError(f"{tensor.path}: the bytes of {tensor.name} are not a {tensor.dtype} {tensor.shape}")


def list_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of a component's files, by name.

    Raises:
        CheckpointError: An incomplete file, or a tensor that is in two files.
    """
    found: dict[str, StoredTensor] = {}
    for path in files:
        tensors, _ = read_header(path)
        if duplicates := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(f"{path}: {duplicates[0]} is in {found[duplicates[0]].path.name} too")
        found |= tensors
    return found


def check_names_and_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], origin: str
) -> None:
    """Raise an error unless the tensors found are exactly those of a network.

    Raises:
        CheckpointError: Missing, unexpected or misshapen tensors, all in one message.
    """
    faults = [f"missing {name}" for name in expected.keys() - found.keys()]
    faults += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    faults += [
        f"{name} is {found[name]}, the network has {expected[name]}"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    refuse_misfits(faults, origin)


def refuse_misfits(faults: list[str], origin: str) -> None:
    """Raise an error with the first faults of a component's tensors, if there are any.

    Raises:
        CheckpointError: The faults, in one line.
    """
    if faults:
        more = f" and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
        shown = "; ".join(sorted(faults)[:MAX_LISTED])
        raise CheckpointError(f"{origin}: the weights do not fit the network: {shown}{more}")


def find_config_folder(path: Path | None, own: Path) -> Path:
    """Return the folder that describes a component.

    Args:
        path: The component's replacement: a folder, a file (described by its folder if that has a config.json), or
            None.
        own: The component's folder in the checkpoint.
    """
    if path is None:
        return own
    if path.is_dir():
        return path
    return path.parent if (path.parent / "config.json").is_file() else own


def check_tokenizer(folder: Path) -> None:
    """Raise an error if a folder holds no tokenizer, or one that no installed package reads.

    Raises:
        CheckpointError: The files that a tokenizer needs, or the package to install.
    """
    found = [names for names in TOKENIZER_FILES if all((folder / name).is_file() for name in names)]
    for name in (name for names in found for name in names):
        check_not_pointer(folder / name)
    if not found:
        expected = ", or ".join(" and ".join(names) for names in TOKENIZER_FILES)
        raise CheckpointError(f"{folder}: no tokenizer files here; expected {expected}")
    if found == [SENTENCEPIECE] and importlib.util.find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{folder}: {SENTENCEPIECE[0]} needs the package sentencepiece: pip install sentencepiece"
        )


def check_component(folder: Path, weights: Path | None, classes: tuple[str, ...] = ()) -> dict[str, StoredTensor]:
    """Raise an error for a component without config.json, of another class, quantized, or with an incomplete file.

    Args:
        folder: The folder with its config.json.
        weights: The folder of its weights, or one file of them; None for random weights.
        classes: The values of `_class_name` that it may have; empty for any.

    Returns:
        Its tensors by name; none for random weights.

    Raises:
        CheckpointError: What is missing, unsupported or broken, and where.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no {'config.json here' if folder.is_dir() else 'such folder'}")
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if classes and name not in classes:
        raise CheckpointError(f"{folder}: config.json says _class_name={name}; this model needs {' or '.join(classes)}")
    if weights is None:
        return {}
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{folder}: quantised weights (quantization_config) are not read here; give BF16 or F32")
    return list_tensors(component_files(weights))
