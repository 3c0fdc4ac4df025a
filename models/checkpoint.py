"""Reading weights: safetensors only, never a pickle, streamed tensor by tensor, every mismatch listed in one error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.empty import build_empty, fill_dummy
from models.files import CheckpointError, check_whole
from models.names import NameMap
from models.source import Source

SHOWN = 6
REOPEN_BYTES = 64 * 2**20  # pages of a mapped file count as memory in use until it is closed
N = TypeVar("N", bound=nn.Module)
Shape = tuple[int, ...]


def load_network(
    make: Callable[[], N], source: Source, component: str, names: NameMap, keep_float32: Sequence[str] = ()
) -> N:
    """A native network with its weights, in evaluation mode.

    Args:
        make: builds it; it is called where parameters are left unfilled and have the component's dtype.
        source: the checkpoint.
        component: the network's folder in it.
        names: from the published names to the network's own.
        keep_float32: patterns (fnmatch) of the network's own parameter names that stay float32 whatever the dtype.

    Raises:
        CheckpointError: no weights, unreadable ones, or names and shapes that do not match; all of them listed.
    """
    network = build_empty(make, source.dtype_of(component), source.device)
    for name, parameter in network.named_parameters():
        if any(fnmatch(name, pattern) for pattern in keep_float32):
            parameter.data = torch.empty_like(parameter, dtype=torch.float32)
    if source.dummy:
        fill_dummy(network)
    else:
        stream_into(network, source.weights(component), names, str(source.config_folder(component)))
    return network.requires_grad_(False).eval()


def stream_into(network: nn.Module, files: Sequence[Path], names: NameMap, origin: str) -> None:
    """Copies the tensors of safetensors files into a network, one at a time, to its dtypes and device.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors, all in one message, before any is copied.
    """
    expected = network.state_dict()
    refuse_mismatch(
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
        {names.ours(name): shape for path in files for name, shape in _shapes(path).items()},
        origin,
    )
    with torch.no_grad():
        for path in files:
            for name, tensor in _tensors(path):
                expected[names.ours(name)].copy_(tensor)


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of safetensors files, on the CPU, in the dtype they are stored in.

    Raises:
        CheckpointError: a file that is truncated or foreign.
    """
    return {name: tensor.clone() for path in files for name, tensor in _tensors(path)}


def _shapes(path: Path) -> dict[str, Shape]:
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file in its order, each to be used before the next is asked for."""
    with _opened(path) as file:
        pending = sorted(file.keys(), key=lambda name: -math.prod(file.get_slice(name).get_shape()))
    while pending:
        read = 0
        with _opened(path) as file:
            while pending and read < REOPEN_BYTES:
                name = pending.pop()
                tensor = file.get_tensor(name)
                read += tensor.numel() * tensor.element_size()
                yield name, tensor
                del tensor


def _opened(path: Path) -> safe_open:
    check_whole(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({str(error).splitlines()[0]})") from error


def refuse_mismatch(expected: Mapping[str, Shape], found: Mapping[str, Shape], origin: str) -> None:
    """Refuses tensors that are not exactly those of a network.

    Raises:
        CheckpointError: missing, unexpected or misshapen ones, all in one message.
    """
    faults = [f"missing {name}" for name in expected.keys() - found.keys()]
    faults += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    faults += [
        f"{name} is {found[name]}, the network has {expected[name]}"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    _refuse(faults, origin)


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


def _refuse(faults: list[str], origin: str) -> None:
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        shown = "; ".join(sorted(faults)[:SHOWN])
        raise CheckpointError(f"{origin}: the weights do not fit the network: {shown}{more}")
