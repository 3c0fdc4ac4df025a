"""Reading of one tensor of a safetensors file, in chunks, directly to its destination and in the dtype needed there.

The safetensors package maps a file, whose pages then count as memory in use, or reads a tensor in full. Loading a
network chunk by chunk takes the memory of its weights and of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from models.files import CheckpointError, StoredTensor
from models.tensor_slice import TensorSlice

CHUNK_BYTES = 2**18  # stays in a core's cache, and is small enough for the allocator to reuse
DEVICE_CHUNK_BYTES = 2**24  # to another device, where each copy has a fixed cost
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


def copy_stored(stored: StoredTensor, target: Tensor, tensor_slice: TensorSlice | None = None) -> int:
    """Fill a contiguous tensor with a stored one of the same shape, or with a slice of one, of which only that is read.

    Args:
        stored: The stored tensor.
        target: The tensor to fill; it keeps its dtype and device.
        tensor_slice: The slice to read; None for the full tensor.

    Returns:
        The number of bytes read.

    Raises:
        CheckpointError: The file ends early, or a number is NaN or infinite.
    """
    flat, done = target.view(-1), 0
    for chunk in _read_chunks(stored, CHUNK_BYTES if target.device.type == "cpu" else DEVICE_CHUNK_BYTES, tensor_slice):
        _check_finite(chunk, stored)
        flat[done : done + len(chunk)].copy_(chunk)
        done += len(chunk)
    return done * DTYPES[stored.dtype].itemsize


def read_stored(stored: StoredTensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a stored tensor on the CPU, in its stored dtype or another.

    Raises:
        CheckpointError: The file ends early, or a number is NaN or infinite.
    """
    tensor = torch.empty(stored.shape, dtype=dtype or DTYPES[stored.dtype], device="cpu")
    copy_stored(stored, tensor)
    return tensor


def _check_finite(chunk: Tensor, stored: StoredTensor) -> None:
    """Raise an error for NaN or infinity; the sum of finite numbers is nearly always finite, and costs little.

    Raises:
        CheckpointError: The file and the tensor.
    """
    if chunk.is_floating_point() and not math.isfinite(chunk.sum().item()) and not torch.isfinite(chunk).all():
        raise CheckpointError(
            f"{stored.path}: {stored.name} holds NaN or infinity; copy the file again, or give another"
        )


def _read_chunks(stored: StoredTensor, limit: int, tensor_slice: TensorSlice | None) -> Iterator[Tensor]:
    """Yield the tensor's elements in order, as 1-D tensors in one buffer; each is valid until the next is requested."""
    buffer, filled = torch.empty(min(stored.end - stored.start, limit), dtype=torch.uint8, device="cpu"), 0
    view = buffer.numpy().data
    with stored.path.open("rb", buffering=0) as file:
        for start, end in _byte_ranges(stored, tensor_slice):
            file.seek(start)
            while start < end:
                size = min(end - start, len(view) - filled)
                if file.readinto(view[filled : filled + size]) != size:
                    raise CheckpointError(f"{stored.path}: {stored.name} could not be read to its end")
                start, filled = start + size, filled + size
                if filled == len(view):
                    yield buffer.view(DTYPES[stored.dtype])
                    filled = 0
    if filled:
        yield buffer[:filled].view(DTYPES[stored.dtype])


def _byte_ranges(stored: StoredTensor, tensor_slice: TensorSlice | None) -> Iterator[tuple[int, int]]:
    """Yield (start, end) in the file of the bytes to read."""
    if tensor_slice is None:
        yield stored.start, stored.end
        return
    width = DTYPES[stored.dtype].itemsize
    for start, end in tensor_slice.element_ranges(stored.shape):
        yield stored.start + start * width, stored.start + end * width
