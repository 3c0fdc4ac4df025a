"""Reading one tensor of a safetensors file: in pieces, straight to where it is wanted and in the dtype wanted there.

The safetensors package maps a file, whose pages then count as memory in use, or reads a tensor whole. Loading a network
piece by piece takes the memory of its weights and of one piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.files import CheckpointError, Stored
from models.parts import Part

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


def copy_stored(stored: Stored, target: Tensor, part: Part | None = None) -> int:
    """Fills a contiguous tensor with a stored one of the same shape, or with a part of one, of which only that is read.

    It keeps its dtype and device.

    Returns:
        The bytes that were read.

    Raises:
        CheckpointError: the file ends early.
    """
    flat, done = target.view(-1), 0
    for piece in _pieces(stored, PIECE_BYTES if target.device.type == "cpu" else FAR_PIECE_BYTES, part):
        flat[done : done + len(piece)].copy_(piece)
        done += len(piece)
    return done * DTYPES[stored.kind].itemsize


def read_stored(stored: Stored, dtype: torch.dtype | None = None) -> Tensor:
    """A stored tensor on the CPU, in the dtype it is stored in or another.

    Raises:
        CheckpointError: the file ends early.
    """
    tensor = torch.empty(stored.shape, dtype=dtype or DTYPES[stored.kind], device="cpu")
    copy_stored(stored, tensor)
    return tensor


def _pieces(stored: Stored, most: int, part: Part | None) -> Iterator[Tensor]:
    """Its numbers in order, as 1-D tensors in one buffer, each to be used before the next is asked for."""
    buffer, filled = torch.empty(min(stored.end - stored.start, most), dtype=torch.uint8, device="cpu"), 0
    room = buffer.numpy().data
    with stored.path.open("rb", buffering=0) as file:
        for start, end in _spans(stored, part):
            file.seek(start)
            while start < end:
                size = min(end - start, len(room) - filled)
                if file.readinto(room[filled : filled + size]) != size:
                    raise CheckpointError(f"{stored.path}: {stored.name} could not be read to its end")
                start, filled = start + size, filled + size
                if filled == len(room):
                    yield buffer.view(DTYPES[stored.kind])
                    filled = 0
    if filled:
        yield buffer[:filled].view(DTYPES[stored.kind])


def _spans(stored: Stored, part: Part | None) -> Iterator[tuple[int, int]]:
    """(start, end) in the file of the bytes that are wanted."""
    if part is None:
        yield stored.start, stored.end
        return
    width = DTYPES[stored.kind].itemsize
    for first, behind in part.spans(stored.shape):
        yield stored.start + first * width, stored.start + behind * width
