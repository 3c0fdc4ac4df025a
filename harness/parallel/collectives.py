"""Bytes between ranks, over gloo: broadcast and gather. At size 1 each is the identity.

A rank that waits in a broadcast sleeps in the kernel; the group's timeout is long, so that an idle engine can wait for
days, and a peer that dies closes its sockets, which ends the wait at once.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from harness.messages import pack_frames, unpack_frames

IDLE_TIMEOUT = timedelta(days=30)


class Collectives(Protocol):
    """What the request scheduler and the worker need of the other ranks."""

    def broadcast(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank; the others pass None."""

    def gather(self, frames: list[bytes]) -> list[list[bytes]]:
        """Every rank's frames on rank 0, in rank order; an empty list on the others."""


class Alone:
    """World size 1."""

    def broadcast(self, data: bytes | None) -> bytes:
        if data is None:
            raise ValueError("rank 0 broadcasts bytes, not None")
        return data

    def gather(self, frames: list[bytes]) -> list[list[bytes]]:
        return [frames]


class Gloo:
    """A gloo group over all ranks of the process group, which must be initialised."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
        self._rank = dist.get_rank()
        self._size = dist.get_world_size()

    def broadcast(self, data: bytes | None) -> bytes:
        length = torch.tensor([len(data) if data is not None else 0])
        dist.broadcast(length, src=0, group=self._group)
        payload = _to_tensor(data) if data is not None else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(payload, src=0, group=self._group)
        return data if data is not None else payload.numpy().tobytes()

    def gather(self, frames: list[bytes]) -> list[list[bytes]]:
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
