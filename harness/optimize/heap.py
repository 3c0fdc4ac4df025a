"""Memory of the CPU that is kept for the next tensor, as CUDA's caching allocator keeps a GPU's.

glibc maps what takes more than 32 MiB anew for every tensor and unmaps it behind it, and the kernel clears each page
when it is first touched: a SiLU over the activations of a decoder spends three quarters of its time on that.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST = 2**31 - 1


def keep_freed() -> bool:
    """Makes this process keep what it frees, on the heap of its main thread; false where there is no such setting.

    The resident set then stays near its peak; what lies unused in it goes back by `malloc_trim`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(kind, LARGEST) for kind in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
