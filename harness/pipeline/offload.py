"""Model offload: networks that stay in CPU memory, and are on the device only while their stage runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from harness.pipeline.stage import Stage
from harness.pipeline.state import RunContext, Sample


class OffloadedStage:
    """A stage whose networks are on the device only while it runs.

    Weights do not change. So they are copied to the device before the stage, and released after it; nothing is copied
    back.

    Args:
        stage: the stage that uses the networks.
        networks: the networks, loaded to CPU memory.
        device: the device that computes.
    """

    def __init__(self, stage: Stage, networks: Iterable[nn.Module], device: torch.device) -> None:
        self.name, self.reads, self.writes = stage.name, stage.reads, stage.writes
        self._stage = stage
        self._device = device
        self._host_copies = [(tensor, _host_copy(tensor, device)) for tensor in _tensors(networks)]

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        """Run the stage with its networks on the device."""
        for tensor, host_copy in self._host_copies:
            tensor.data = host_copy.to(self._device, non_blocking=True, copy=True)
        try:
            self._stage.forward(samples, run)
        finally:
            for tensor, host_copy in self._host_copies:
                tensor.data = host_copy
            run.memory.release()


def _tensors(networks: Iterable[nn.Module]) -> Iterator[Tensor]:
    for network in networks:
        yield from chain(network.parameters(), network.buffers())


def _host_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor in CPU memory, pinned for a GPU, which then copies without help of the processor."""
    return tensor.data.pin_memory() if device.type == "cuda" else tensor.data
