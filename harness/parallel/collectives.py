"""Broadcast and gather of bytes between ranks, over gloo. At size 1 each is the identity.

A rank that waits in a broadcast sleeps in the kernel. The timeout of the group is long, so that an idle engine can wait
for days. A peer that dies closes its sockets, which ends the wait at once.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from harness.messages import pack_frames, unpack_frames

IDLE_TIMEOUT = timedelta(days=30)


class Collectives(Protocol):
    """What the request scheduler and the worker need from the other ranks."""

    def broadcast(self, data: bytes | None) -> bytes:
        """Return rank 0's bytes on every rank; the others pass None."""

    def gather(self, frames: list[bytes]) -> list[list[bytes]]:
        """Return every rank's frames on rank 0, in rank order; an empty list on the others."""


class LocalCollectives:
    """The collectives of a single rank."""

    def broadcast(self, data: bytes | None) -> bytes:
        """Return the bytes unchanged.

        Args:
            data: the bytes to broadcast.

        Returns:
            The same bytes.

        Raises:
            ValueError: if there are no bytes.
        """
        if data is None:
            raise ValueError("rank 0 broadcasts bytes, not None")
        return data

    def gather(self, frames: list[bytes]) -> list[list[bytes]]:
        """Return the frames of the only rank."""
        return [frames]


class GlooCollectives:
    """Collectives over a gloo group of all ranks; the process group must be initialised."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
        self._rank = dist.get_rank()
        self._size = dist.get_world_size()

    def broadcast(self, data: bytes | None) -> bytes:
        """Send the length, then the bytes of rank 0."""
        length = torch.tensor([len(data) if data is not None else 0])
        dist.broadcast(length, src=0, group=self._group)
        payload = _to_tensor(data) if data is not None else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(payload, src=0, group=self._group)
        return data if data is not None else payload.numpy().tobytes()

    def gather(self, frames: list[bytes]) -> list[list[bytes]]:
        """Send every rank's frames to rank 0, one rank after another."""
        data = pack_frames(frames)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self._size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self._group)
        if self._rank != 0:
            dist.send(_to_tensor(data), dst=0, group=self._group)
            return []
        received = [frames]
        for rank in range(1, self._size):
            payload = torch.empty(int(lengths[rank]), dtype=torch.uint8)
            dist.recv(payload, src=rank, group=self._group)
            received.append(unpack_frames(payload.numpy().tobytes()))
        return received


def _to_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
