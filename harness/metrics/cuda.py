"""The CUDA allocator's account of memory, MiB. Not run on a machine without a GPU."""

from __future__ import annotations

import torch


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
