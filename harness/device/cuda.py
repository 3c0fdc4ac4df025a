"""Functions of CUDA: synchronization, the allocator's memory in MiB, and energy in joules.

They do not run on a machine without a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Return a function that waits until a device has done all its work; on the CPU there is nothing to wait for."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


class CudaMemory:
    """The memory that PyTorch's caching allocator has handed out on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def used_mib(self) -> float:
        """Return the memory allocated now, MiB."""
        return torch.cuda.memory_allocated(self._device) / 2**20

    def peak_mib(self) -> float:
        """Return the largest allocation since the last reset, MiB."""
        return torch.cuda.max_memory_allocated(self._device) / 2**20

    def release(self) -> None:
        """Return cached memory to the device."""
        torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        """Reset the allocator's peak."""
        torch.cuda.reset_peak_memory_stats(self._device)


class CudaEnergy:
    """The energy of one GPU, by NVML's counter since the driver was loaded (Volta and later; package nvidia-ml-py).

    Raises:
        ModuleNotFoundError: The package is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        self._gpu = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        self._before = 0.0
        self.reset()

    def reset(self) -> None:
        """Start counting from now."""
        self._before = self._counter_j()

    def used_j(self) -> float | None:
        """Return the energy since the last reset, J."""
        return self._counter_j() - self._before

    def _counter_j(self) -> float:
        counted: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)
        return counted / 1e3
