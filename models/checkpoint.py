"""Reading weights: safetensors only, never a pickle, and every mismatch listed in one error."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

STEMS = ("diffusion_pytorch_model", "model")
SHOWN = 6


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with what to change in one line."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component's folder: one, or the shards that its index names.

    Raises:
        CheckpointError: none there, or a shard that the index names is missing.
    """
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise CheckpointError(f"{folder}: shard {missing[0]} is named by {index.name} but is not there")
            return [folder / name for name in names]
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return [single]
    raise CheckpointError(f"{folder}: no weights here; expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors")


def check_header(path: Path) -> None:
    """Refuses a file that is not a whole safetensors file, from its header and length alone.

    Raises:
        CheckpointError: truncated, or not the safetensors format.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({str(error).splitlines()[0]})") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a component's folder, on the CPU, in the dtype they are stored in.

    Raises:
        CheckpointError: no weights, or a file that is truncated or foreign.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        check_header(path)
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
    return tensors


def load_into(network: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copies tensors into a network of the same names and shapes.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors, all in one message.
    """
    expected = network.state_dict()
    faults = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    faults += [f"unexpected {name}" for name in tensors.keys() - expected.keys()]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, the network has {tuple(expected[name].shape)}"
        for name in expected.keys() & tensors.keys()
        if expected[name].shape != tensors[name].shape
    ]
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise CheckpointError(f"{source}: the weights do not fit the network: {'; '.join(sorted(faults)[:SHOWN])}{more}")
    network.load_state_dict(tensors)
