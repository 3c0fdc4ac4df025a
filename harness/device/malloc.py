"""What happens to freed memory of CPU tensors: kept for the next tensors, as on a GPU, or returned to the system.

glibc maps memory of more than 32 MiB anew for every tensor and unmaps it afterwards. The kernel clears each page when
it is first touched. For the activations of a decoder this takes longer than to compute a SiLU over them.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # constants of glibc's malloc.h
LARGEST = 2**31 - 1
MAPPED_BYTES = 1 << 20  # from this size on, every tensor is mapped on its own


def retain_freed_memory() -> bool:
    """Make this process keep freed memory on the heap of its main thread.

    The resident set then stays near its peak. `malloc_trim` returns the unused part of it.

    Returns:
        False if there is no such setting.
    """
    return all(_set(kind, LARGEST) for kind in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def return_freed() -> bool:
    """Make this process return freed memory to the system.

    glibc raises its threshold with the size of freed blocks, up to 32 MiB, and keeps smaller tensors on a heap.

    Returns:
        False if there is no such setting.
    """
    return _set(M_MMAP_THRESHOLD, MAPPED_BYTES)


def _set(kind: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(kind, value))
