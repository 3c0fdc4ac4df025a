"""Loading of weights: safetensors only, never a pickle, streamed chunk by chunk, every mismatch listed in one error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from models.checkpoint_source import CheckpointSource
from models.files import check_names_and_shapes, list_tensors, refuse_misfits
from models.lora import Update, lora_updates, merge_updates
from models.meta_init import allocate, build_empty, fill_dummy
from models.names import NameMap
from models.plan import UNSHARDED, ParallelPlan
from models.tensor_slice import TensorSlice
from models.tensors import copy_stored

N = TypeVar("N", bound=nn.Module)


def load_network(
    make: Callable[[], N],
    source: CheckpointSource,
    component: str,
    names: NameMap,
    plan: ParallelPlan = UNSHARDED,
    keep_float32: Sequence[str] = (),
) -> N:
    """Build a native network with the checkpoint's weights, in evaluation mode.

    If the source shards the denoiser, only this rank's shard is loaded.

    Args:
        make: The function that builds the network; it is called with initialization skipped and the component's dtype.
        source: The checkpoint.
        component: The network's folder in the checkpoint.
        names: The map from published names to the network's own.
        plan: The network's parallel plan.
        keep_float32: Patterns (fnmatch) of the network's own parameter names that stay float32 in any dtype.

    Returns:
        The network, without gradients.

    Raises:
        CheckpointError: No weights, unreadable ones, or names and shapes that do not match, all of them listed.
    """
    started = time.perf_counter()
    device = source.device_of(component)
    network = build_empty(make, source.dtype_of(component), device if source.shard_network is None else "cpu")
    for name, parameter in network.named_parameters():
        if any(fnmatch(name, pattern) for pattern in keep_float32):
            parameter.data = torch.empty_like(parameter, dtype=torch.float32)
    slices: Mapping[str, TensorSlice] = {}
    if source.shard_network is not None:
        allocate(network, "meta")  # so that the removed parameters never take memory
        slices = source.shard_network(network, plan)
        allocate(network, device)
        network.to(device)
    load_weights(network, source, component, names, started, slices)
    return network.requires_grad_(False).eval()


def load_weights(
    network: nn.Module,
    source: CheckpointSource,
    component: str,
    names: NameMap,
    started: float,
    slices: Mapping[str, TensorSlice] | None = None,
) -> None:
    """Fill an uninitialized network with the checkpoint's weights or random ones, and record the load.

    Args:
        network: The network to fill.
        source: The checkpoint.
        component: The network's folder in the checkpoint.
        names: The map from published names to the network's own.
        started: The time.perf_counter() at the start of the load, in seconds.
        slices: The slice of the stored tensor for each sharded parameter, by the network's own name.

    Raises:
        CheckpointError: The cases of `stream_into`.
    """
    updates: Mapping[str, Sequence[Update]] = {}
    bytes_read = 0
    if source.dummy:
        fill_dummy(network, slices=slices)
    else:
        updates, origin = lora_updates(source, component), str(source.path_of(component))
        bytes_read = stream_into(network, source.weights(component), names, origin, updates, slices)
    source.record(component, network, started, len(updates), bytes_read)


def stream_into(
    network: nn.Module,
    files: Sequence[Path],
    names: NameMap,
    origin: str,
    updates: Mapping[str, Sequence[Update]] | None = None,
    slices: Mapping[str, TensorSlice] | None = None,
) -> int:
    """Copy the tensors of safetensors files into a network, chunk by chunk, in its dtypes and on its device.

    Args:
        network: The network to fill.
        files: The component's safetensors files.
        names: The map from published names to the network's own.
        origin: The component's name in error messages.
        updates: The updates of a tensor, by published name; they are added before rounding to the network's
            dtype.
        slices: The slice of the stored tensor for each sharded parameter, by the network's own name. Only the slice is
            read. A tensor with updates is read in full, so that its values do not depend on the slice.

    Returns:
        The number of bytes read.

    Raises:
        CheckpointError: Missing, unexpected or misshapen tensors, all in one message, before any is copied.
    """
    expected, stored, slices, bytes_read = network.state_dict(), list_tensors(files), slices or {}, 0
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    check_names_and_shapes(
        shapes | {name: tensor_slice.full_shape(shapes[name]) for name, tensor_slice in slices.items()},
        {names.to_native(name): tensor.shape for name, tensor in stored.items()},
        origin,
    )
    with torch.no_grad():
        for name, tensor in stored.items():
            target, tensor_slice = expected[names.to_native(name)], slices.get(names.to_native(name))
            if added := (updates or {}).get(name):
                summed = merge_updates(tensor, added)
                target.copy_(summed if tensor_slice is None else tensor_slice.of(summed))
                bytes_read += tensor.end - tensor.start
            else:
                bytes_read += copy_stored(tensor, target, tensor_slice)
    return bytes_read


def check_loading_info(found: Mapping[str, Iterable[object]], folder: Path) -> None:
    """Raise an error if a library loaded weights only in part, from the loading information it returns.

    Args:
        found: Lists under missing_keys, unexpected_keys and mismatched_keys (the names of transformers and diffusers).
        folder: The component's folder.

    Raises:
        CheckpointError: Missing, unexpected or misshapen tensors, all in one message.
    """
    words = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "misshapen"}
    refuse_misfits([f"{word} {name}" for kind, word in words.items() for name in found.get(kind, ())], str(folder))
