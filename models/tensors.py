"""Reading one tensor of a safetensors file: in pieces, straight to where it is wanted and in the dtype wanted there.

The safetensors package maps a file, whose pages then count as memory in use, or reads a tensor whole. Loading a network
piece by piece takes the memory of its weights and of one piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.files import CheckpointError, Stored

PIECE_BYTES = 2**18  # stays in a core's cache, and is small enough for the allocator to reuse
FAR_PIECE_BYTES = 2**24  # to another device, where each copy has a price of its own
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


def copy_stored(stored: Stored, target: Tensor) -> None:
    """Fills a contiguous tensor of the same shape with a stored one, in the target's dtype and on its device.

    Raises:
        CheckpointError: the file ends early.
    """
    flat, done = target.view(-1), 0
    for piece in _pieces(stored, PIECE_BYTES if target.device.type == "cpu" else FAR_PIECE_BYTES):
        flat[done : done + len(piece)].copy_(piece)
        done += len(piece)


def read_stored(stored: Stored, dtype: torch.dtype | None = None) -> Tensor:
    """A stored tensor on the CPU, in the dtype it is stored in or another.

    Raises:
        CheckpointError: the file ends early.
    """
    tensor = torch.empty(stored.shape, dtype=dtype or DTYPES[stored.kind], device="cpu")
    copy_stored(stored, tensor)
    return tensor


def _pieces(stored: Stored, most: int) -> Iterator[Tensor]:
    """Its numbers in order, as 1-D tensors in one buffer, each to be used before the next is asked for."""
    left = stored.end - stored.start
    buffer = torch.empty(min(left, most), dtype=torch.uint8, device="cpu")
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        while left:
            part = buffer[: min(left, most)]
            if file.readinto(part.numpy().data) != len(part):
                raise CheckpointError(f"{stored.path}: {stored.name} could not be read to its end")
            left -= len(part)
            yield part.view(DTYPES[stored.kind])
