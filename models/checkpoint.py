"""Reading weights: safetensors only, never a pickle, streamed piece by piece, every mismatch listed in one error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from models.empty import build_empty, fill_dummy
from models.files import CheckpointError, tensors_of
from models.lora import LowRank, merged, updates_of
from models.names import NameMap
from models.source import Source
from models.tensors import copy_stored

SHOWN = 6
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
    began = time.perf_counter()
    network = build_empty(make, source.dtype_of(component), source.device)
    for name, parameter in network.named_parameters():
        if any(fnmatch(name, pattern) for pattern in keep_float32):
            parameter.data = torch.empty_like(parameter, dtype=torch.float32)
    fill(network, source, component, names, began)
    return network.requires_grad_(False).eval()


def fill(network: nn.Module, source: Source, component: str, names: NameMap, began: float) -> None:
    """Fills a network that was built empty, with the checkpoint's weights or random ones, and notes what it took.

    Raises:
        CheckpointError: as `stream_into`.
    """
    updates: Mapping[str, Sequence[LowRank]] = {}
    if source.dummy:
        fill_dummy(network)
    else:
        updates = updates_of(source, component)
        stream_into(network, source.weights(component), names, str(source.path_of(component)), updates)
    source.record(component, network, began, len(updates))


def stream_into(
    network: nn.Module,
    files: Sequence[Path],
    names: NameMap,
    origin: str,
    updates: Mapping[str, Sequence[LowRank]] | None = None,
) -> None:
    """Copies the tensors of safetensors files into a network, piece by piece, to its dtypes and device.

    Args:
        network: what is filled.
        files: the component's.
        names: from the published names to the network's own.
        origin: the component, for messages.
        updates: by published name, what is added to a tensor before it is rounded to the network's dtype.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors, all in one message, before any is copied.
    """
    expected, stored = network.state_dict(), tensors_of(files)
    refuse_mismatch(
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
        {names.ours(name): tensor.shape for name, tensor in stored.items()},
        origin,
    )
    with torch.no_grad():
        for name, tensor in stored.items():
            added = (updates or {}).get(name)
            if added:
                expected[names.ours(name)].copy_(merged(tensor, added))
            else:
                copy_stored(tensor, expected[names.ours(name)])


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
