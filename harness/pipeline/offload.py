"""Model offload: networks that live in CPU memory and are on the device only while their stage runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from harness.pipeline.stage import Stage
from harness.pipeline.state import RunContext, Sample


class OffloadedStage:
    """A stage whose networks visit the device.

    Weights do not change, so they are copied to the device before the stage and let go after it; none is copied back.

    Args:
        stage: that uses them.
        networks: loaded to CPU memory.
        device: where they compute.
    """

    def __init__(self, stage: Stage, networks: Iterable[nn.Module], device: torch.device) -> None:
        self.name, self.reads, self.writes = stage.name, stage.reads, stage.writes
        self._stage = stage
        self._device = device
        self._host_copies = [(tensor, _host_copy(tensor, device)) for tensor in _tensors(networks)]

    def forward(self, samples: list[Sample], run: RunContext) -> None:
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
    """In CPU memory, from which a GPU copies without help of the processor."""
    return tensor.data.pin_memory() if device.type == "cuda" else tensor.data
