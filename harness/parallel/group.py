"""Tensors between the ranks of one mesh axis, with every byte and every waiting millisecond counted by kind.

At size 1 each collective is the identity and counts nothing, so that one path serves one device and eight. Bytes are
what this rank sends, by the usual algorithms: N ranks, x the bytes of its own tensor,

    all_to_all   x (N - 1) / N        all_gather   x (N - 1)
    all_reduce   2 x (N - 1) / N      shift, send  x
    broadcast    x (N - 1), of the rank that has it

An all_gather whose answer is asked for later is a kind of its own, `all_gather displaced`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from harness import messages


@dataclass
class Traffic:
    """What this rank has sent since the last reset: bytes, calls and exposed time by kind of collective."""

    sent_bytes: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    exposed_ms: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, sent: int, ms: float) -> None:
        """One call."""
        self.sent_bytes[kind] = self.sent_bytes.get(kind, 0) + sent
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.exposed_ms[kind] = self.exposed_ms.get(kind, 0.0) + ms

    def take(self) -> dict[str, messages.CollectiveTraffic]:
        """What was counted, by kind; counting begins anew."""
        taken = {
            kind: messages.CollectiveTraffic(sent, self.calls[kind], self.exposed_ms[kind])
            for kind, sent in self.sent_bytes.items()
        }
        self.reset()
        return taken

    def reset(self) -> None:
        """Forgets what was counted."""
        for counted in (self.sent_bytes, self.calls, self.exposed_ms):
            counted.clear()


class Group:
    """The ranks along one axis that this rank belongs to.

    Args:
        ranks: of the world, in the order of the axis.
        rank: this rank, in the world.
        handle: torch's process group; None at size 1.
        traffic: where bytes and times are counted.
        synchronize: waits for the device, so that a time is a time.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        handle: dist.ProcessGroup | None,
        traffic: Traffic,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.index = self.ranks.index(rank)
        self.handle = handle
        self.traffic = traffic
        self.synchronize = synchronize

    def all_to_all(self, x: Tensor) -> Tensor:
        """Row i of x, of shape (N, ...), goes to the i-th rank; row i of the answer comes from it."""
        if self.size == 1:
            return x
        x = x.contiguous()
        out = torch.empty_like(x)
        self._timed("all_to_all", _bytes(x) * (self.size - 1) // self.size, lambda: self._exchange(out, x))
        return out

    def _exchange(self, out: Tensor, x: Tensor) -> None:
        dist.all_to_all_single(out, x, group=self.handle)

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, stacked: (...) to (N, ...)."""
        if self.size == 1:
            return x[None]
        x = x.contiguous()
        out = x.new_empty((self.size, *x.shape))
        parts = list(out.unbind(0))
        self._timed("all_gather", _bytes(x) * (self.size - 1), lambda: dist.all_gather(parts, x, group=self.handle))
        return out

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Starts all_gather; the answer waits for it, and only that wait is exposed time."""
        if self.size == 1:
            return lambda: x[None]
        x = x.contiguous()
        out = x.new_empty((self.size, *x.shape))
        work = dist.all_gather(list(out.unbind(0)), x, group=self.handle, async_op=True)

        def wait() -> Tensor:
            self._timed("all_gather displaced", _bytes(x) * (self.size - 1), work.wait)
            return out

        return wait

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.size == 1:
            return x
        out = x.clone(memory_format=torch.contiguous_format)
        sent = 2 * _bytes(x) * (self.size - 1) // self.size
        self._timed("all_reduce", sent, lambda: dist.all_reduce(out, group=self.handle))
        return out

    def shift(self, x: Tensor) -> Callable[[], Tensor]:
        """Starts to send x to the next rank of the ring; the answer waits for what comes from the one before.

        Only the wait is exposed time: what is computed between the two calls hides the rest.
        """
        if self.size == 1:
            return lambda: x
        x = x.contiguous()
        out = torch.empty_like(x)
        here, after, before = self.index, self.ranks[(self.index + 1) % self.size], self.ranks[self.index - 1]
        ops = [
            dist.P2POp(dist.isend, x, after, self.handle),
            dist.P2POp(dist.irecv, out, before, self.handle),
        ]
        works = dist.batch_isend_irecv(ops if here % 2 == 0 else ops[::-1])

        def wait() -> Tensor:
            def all_of_them() -> None:
                for work in works:
                    work.wait()

            self._timed("shift", _bytes(x), all_of_them)
            return out

        return wait

    def send(self, x: Tensor, to: int) -> Callable[[], None]:
        """Starts to send x to the rank of that index; the answer waits until it has gone."""
        x = x.contiguous()
        work = dist.isend(x, self.ranks[to], group=self.handle)
        assert work is not None
        return lambda: self._timed("send", _bytes(x), work.wait)

    def receive(self, out: Tensor, sender: int) -> Callable[[], Tensor]:
        """Starts to fill `out`, contiguous, with what the rank of that index sends; the answer waits for it.

        Its wait is exposed time of the messages that are sent.
        """
        work = dist.irecv(out, self.ranks[sender], group=self.handle)
        assert work is not None

        def wait() -> Tensor:
            self._timed("send", 0, work.wait)
            return out

        return wait

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The x of the rank of that index, on all of them; the others give one of its shape."""
        if self.size == 1:
            return x
        out = x.clone(memory_format=torch.contiguous_format)
        sent = _bytes(x) * (self.size - 1) if self.index == source else 0
        self._timed("broadcast", sent, lambda: dist.broadcast(out, self.ranks[source], group=self.handle))
        return out

    def all_gather_uneven(self, x: Tensor, dim: int) -> Tensor:
        """Every rank's x joined along `dim`, where their lengths may differ."""
        if self.size == 1:
            return x
        lengths = [int(n) for n in self.all_gather(torch.tensor([x.shape[dim]], device=x.device))]
        spare = max(lengths) - x.shape[dim]
        filler = x.new_zeros([spare if d == dim % x.ndim else n for d, n in enumerate(x.shape)])
        parts = self.all_gather(torch.cat([x, filler], dim=dim))
        return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, lengths, strict=True)], dim=dim)

    def neighbours(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Sends `first` to the rank before and `last` to the one after; what those sent, zeros at the ends."""
        before, after = first.new_zeros(first.shape), last.new_zeros(last.shape)
        above, below = self.index - 1, self.index + 1
        self._meet_neighbours([(above, first), (below, last)], [(above, before), (below, after)])
        return before, after

    def from_before(self, last: Tensor) -> Tensor:
        """Sends `last` to the rank after; what the rank before sent, of the same shape, zeros at the first."""
        before = last.new_zeros(last.shape)
        self._meet_neighbours([(self.index + 1, last)], [(self.index - 1, before)])
        return before

    def _meet_neighbours(self, sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]) -> None:
        """Sends and fills tensors, each with a rank's index; those beyond the first and the last are left out."""
        if self.size == 1:
            return
        sent = [(index, x.contiguous()) for index, x in sent if index in range(self.size)]
        received = [(index, x) for index, x in received if index in range(self.size)]
        ops = [dist.P2POp(dist.isend, x, self.ranks[index], self.handle) for index, x in sent]
        ops += [dist.P2POp(dist.irecv, x, self.ranks[index], self.handle) for index, x in received]

        def exchange() -> None:
            for work in dist.batch_isend_irecv(ops):
                work.wait()

        self._timed("neighbours", sum(_bytes(x) for _, x in sent), exchange)

    def _timed(self, kind: str, sent: int, call: Callable[[], object]) -> None:
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        self.traffic.add(kind, sent, (time.perf_counter() - start) * 1e3)


def alone(rank: int = 0) -> Group:
    """A group of this rank only."""
    return Group((rank,), rank, None, Traffic())


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
