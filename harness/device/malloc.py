"""What becomes of memory that the CPU's tensors leave: kept for the next ones, as on a GPU, or given back.

glibc maps what takes more than 32 MiB anew for every tensor and unmaps it behind it, and the kernel clears each page
when it is first touched, which takes a SiLU over the activations of a decoder longer than computing it.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST = 2**31 - 1
MAPPED_BYTES = 1 << 20  # tensors from here on are mapped one by one


def retain_freed_memory() -> bool:
    """Makes this process keep what it frees, on the heap of its main thread; false where there is no such setting.

    The resident set then stays near its peak; what lies unused in it goes back by `malloc_trim`.
    """
    return all(_set(kind, LARGEST) for kind in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def return_freed() -> bool:
    """Makes this process return to the system what it frees; false where there is no such setting.

    glibc moves its threshold up with what is freed, up to 32 MiB, and keeps smaller tensors on a heap.
    """
    return _set(M_MMAP_THRESHOLD, MAPPED_BYTES)


def _set(kind: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(kind, value))
