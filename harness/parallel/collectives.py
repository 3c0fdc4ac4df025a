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
from harness.parallel.mesh import RankPosition
from harness.parallel.process_groups import new_replica_group

IDLE_TIMEOUT = timedelta(days=30)


class Collectives(Protocol):
    """What the request scheduler and the worker need from the other ranks."""

    def broadcast(self, data: bytes | None) -> bytes:
        """Return the first rank's bytes on every rank; the others pass None."""

    def gather(self, frames: list[bytes]) -> list[list[bytes]]:
        """Return every rank's frames on the first rank, in rank order; an empty list on the others."""


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
    """Collectives over a gloo group of some ranks; the process group must be initialised.

    Args:
        group: the group; None makes one of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT) if group is None else group
        self._ranks = dist.get_process_group_ranks(self._group)

    def broadcast(self, data: bytes | None) -> bytes:
        """Send the length, then the bytes of the group's first rank."""
        length = torch.tensor([len(data) if data is not None else 0])
        dist.broadcast(length, src=self._ranks[0], group=self._group)
        payload = _to_tensor(data) if data is not None else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(payload, src=self._ranks[0], group=self._group)
        return data if data is not None else payload.numpy().tobytes()

    def gather(self, frames: list[bytes]) -> list[list[bytes]]:
        """Send every rank's frames to the group's first rank, one rank after another."""
        data = pack_frames(frames)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in self._ranks]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self._group)
        if dist.get_rank() != self._ranks[0]:
            dist.send(_to_tensor(data), dst=self._ranks[0], group=self._group)
            return []
        received = [frames]
        for rank, length in zip(self._ranks[1:], lengths[1:], strict=True):
            payload = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(payload, src=rank, group=self._group)
            received.append(unpack_frames(payload.numpy().tobytes()))
        return received


def replica_collectives(position: RankPosition, world: Collectives) -> Collectives:
    """Return the collectives of this rank's replica; all ranks of the world call it at the same time.

    Args:
        position: this rank's position on the mesh.
        world: the collectives over all ranks.

    Returns:
        The collectives, those of the world if there is one replica.
    """
    if position.degrees[0] == 1:
        return world
    if position.replica_size == 1:
        return LocalCollectives()
    return GlooCollectives(new_replica_group(position, IDLE_TIMEOUT))


def _to_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
