"""What is asked of CUDA itself: to finish its work, and the allocator's account of memory, MiB.

Not run on a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits until a device has done all its work; on the CPU there is nothing to wait for."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


class CudaMemory:
    """What PyTorch's caching allocator has handed out on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def used_mib(self) -> float:
        return torch.cuda.memory_allocated(self._device) / 2**20

    def peak_mib(self) -> float:
        return torch.cuda.max_memory_allocated(self._device) / 2**20

    def release(self) -> None:
        torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
