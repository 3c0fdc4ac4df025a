"""Reading weights: safetensors only, never a pickle, streamed piece by piece, every mismatch listed in one error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from models.empty import allocate, build_empty, fill_dummy
from models.files import CheckpointError, tensors_of
from models.lora import LowRank, merged, updates_of
from models.names import NameMap
from models.parts import Part
from models.plan import WHOLE, ParallelPlan
from models.source import Source
from models.tensors import copy_stored

SHOWN = 6
N = TypeVar("N", bound=nn.Module)
Shape = tuple[int, ...]


def load_network(
    make: Callable[[], N],
    source: Source,
    component: str,
    names: NameMap,
    plan: ParallelPlan = WHOLE,
    keep_float32: Sequence[str] = (),
) -> N:
    """A native network with its weights, or with those that the source's cut leaves it, in evaluation mode.

    Args:
        make: builds it; it is called where parameters are left unfilled and have the component's dtype.
        source: the checkpoint.
        component: the network's folder in it.
        names: from the published names to the network's own.
        plan: how the network may be cut.
        keep_float32: patterns (fnmatch) of the network's own parameter names that stay float32 whatever the dtype.

    Raises:
        CheckpointError: no weights, unreadable ones, or names and shapes that do not match; all of them listed.
    """
    began = time.perf_counter()
    device = source.device_of(component)
    network = build_empty(make, source.dtype_of(component), device if source.cut is None else "cpu")
    for name, parameter in network.named_parameters():
        if any(fnmatch(name, pattern) for pattern in keep_float32):
            parameter.data = torch.empty_like(parameter, dtype=torch.float32)
    parts: Mapping[str, Part] = {}
    if source.cut is not None:
        allocate(network, "meta")  # so that what is cut off never takes memory
        parts = source.cut(network, plan)
        allocate(network, device)
        network.to(device)
    fill(network, source, component, names, began, parts)
    return network.requires_grad_(False).eval()


def fill(
    network: nn.Module,
    source: Source,
    component: str,
    names: NameMap,
    began: float,
    parts: Mapping[str, Part] | None = None,
) -> None:
    """Fills a network that was built empty, with the checkpoint's weights or random ones, and notes what it took.

    `parts` says which parameters are parts of the checkpoint's, and which.

    Raises:
        CheckpointError: as `stream_into`.
    """
    updates: Mapping[str, Sequence[LowRank]] = {}
    read = 0
    if source.dummy:
        fill_dummy(network, parts=parts)
    else:
        updates, origin = updates_of(source, component), str(source.path_of(component))
        read = stream_into(network, source.weights(component), names, origin, updates, parts)
    source.record(component, network, began, len(updates), read)


def stream_into(
    network: nn.Module,
    files: Sequence[Path],
    names: NameMap,
    origin: str,
    updates: Mapping[str, Sequence[LowRank]] | None = None,
    parts: Mapping[str, Part] | None = None,
) -> int:
    """Copies the tensors of safetensors files into a network, piece by piece, to its dtypes and device.

    Args:
        network: what is filled.
        files: the component's.
        names: from the published names to the network's own.
        origin: the component, for messages.
        updates: by published name, what is added to a tensor before it is rounded to the network's dtype.
        parts: by the network's own name, which part of the stored tensor it has. Only that is read, but of a tensor
            with updates, which is read whole so that its numbers do not depend on the part.

    Returns:
        The bytes that were read.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors, all in one message, before any is copied.
    """
    expected, stored, parts, read = network.state_dict(), tensors_of(files), parts or {}, 0
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    refuse_mismatch(
        shapes | {name: part.whole(shapes[name]) for name, part in parts.items()},
        {names.ours(name): tensor.shape for name, tensor in stored.items()},
        origin,
    )
    with torch.no_grad():
        for name, tensor in stored.items():
            target, part = expected[names.ours(name)], parts.get(names.ours(name))
            if added := (updates or {}).get(name):
                summed = merged(tensor, added)
                target.copy_(summed if part is None else part.of(summed))
                read += tensor.end - tensor.start
            else:
                read += copy_stored(tensor, target, part)
    return read


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
