"""Reading weights: safetensors only, never a pickle, and every mismatch listed in one error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.files import CheckpointError, check_whole, weight_files

SHOWN = 6


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a component's folder, on the CPU, in the dtype they are stored in.

    Raises:
        CheckpointError: no weights, or a file that is truncated or foreign.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        check_whole(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({str(error).splitlines()[0]})") from error
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
    _refuse(faults, source)
    network.load_state_dict(tensors)


def refuse_misfits(found: Mapping[str, Iterable[object]], folder: Path) -> None:
    """Refuses weights that a library loaded only in part, from the loading information it gives.

    Args:
        found: lists under missing_keys, unexpected_keys and mismatched_keys (transformers' and diffusers' names).
        folder: the component.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors, all in one message.
    """
    words = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "misshapen"}
    _refuse([f"{word} {name}" for kind, word in words.items() for name in found.get(kind, ())], str(folder))


def _refuse(faults: list[str], source: str) -> None:
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        shown = "; ".join(sorted(faults)[:SHOWN])
        raise CheckpointError(f"{source}: the weights do not fit the network: {shown}{more}")
