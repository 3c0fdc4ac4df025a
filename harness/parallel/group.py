"""Tensors between the ranks of one mesh axis, with all bytes and waiting times counted by kind of collective.

At size 1 each collective is the identity and counts nothing, so that one code path serves one device and eight. Bytes
are what this rank sends, by the usual algorithms, with N ranks and x bytes of its own tensor:

    all_to_all   x (N - 1) / N        all_gather   x (N - 1)
    all_reduce   2 x (N - 1) / N      shift, send  x
    broadcast    x (N - 1), on the rank that has the tensor

An all_gather whose result is used later is a kind of its own, `all_gather displaced`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from harness import messages
from harness.device.trace import NoTrace


@dataclass
class TrafficCounter:
    """What this rank has sent since the last reset: bytes, calls and exposed time in ms, by kind of collective.

    `trace` is that of the running request.
    """

    sent_bytes: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    exposed_ms: dict[str, float] = field(default_factory=dict)
    trace: NoTrace = field(default_factory=NoTrace)

    def add(self, kind: str, sent: int, start_s: float, end_s: float) -> None:
        """Count one call; its begin and end are those of Python's performance counter."""
        ms = (end_s - start_s) * 1e3
        self.sent_bytes[kind] = self.sent_bytes.get(kind, 0) + sent
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.exposed_ms[kind] = self.exposed_ms.get(kind, 0.0) + ms
        self.trace.add("collective", kind, start_s * 1e3, ms, bytes=sent)

    def take(self) -> dict[str, messages.CollectiveTraffic]:
        """Return the counts by kind, and reset them."""
        taken = {
            kind: messages.CollectiveTraffic(sent, self.calls[kind], self.exposed_ms[kind])
            for kind, sent in self.sent_bytes.items()
        }
        self.reset()
        return taken

    def reset(self) -> None:
        """Set all counts to zero."""
        for counted in (self.sent_bytes, self.calls, self.exposed_ms):
            counted.clear()


class Group:
    """The ranks along one axis of the mesh that this rank belongs to.

    Args:
        ranks: their ranks in the world, in the order of the axis.
        rank: this rank in the world.
        handle: torch's process group; None at size 1.
        traffic: the counter of bytes and times.
        synchronize: waits for the device, so that times are correct.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        handle: dist.ProcessGroup | None,
        traffic: TrafficCounter,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.index = self.ranks.index(rank)
        self.handle = handle
        self.traffic = traffic
        self.synchronize = synchronize

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send row i of x, of shape (N, ...), to rank i of the group; row i of the result comes from it."""
        if self.size == 1:
            return x
        x = x.contiguous()
        out = torch.empty_like(x)
        self._run_timed("all_to_all", _bytes(x) * (self.size - 1) // self.size, lambda: self._all_to_all_single(out, x))
        return out

    def _all_to_all_single(self, out: Tensor, x: Tensor) -> None:
        dist.all_to_all_single(out, x, group=self.handle)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return every rank's x, stacked: (...) to (N, ...)."""
        if self.size == 1:
            return x[None]
        x = x.contiguous()
        out = x.new_empty((self.size, *x.shape))
        parts = list(out.unbind(0))
        self._run_timed("all_gather", _bytes(x) * (self.size - 1), lambda: dist.all_gather(parts, x, group=self.handle))
        return out

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Start an all_gather, and return a function that waits for the result; only that wait is exposed time."""
        if self.size == 1:
            return lambda: x[None]
        x = x.contiguous()
        out = x.new_empty((self.size, *x.shape))
        work = dist.all_gather(list(out.unbind(0)), x, group=self.handle, async_op=True)

        def wait() -> Tensor:
            self._run_timed("all_gather displaced", _bytes(x) * (self.size - 1), work.wait)
            return out

        return wait

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over ranks."""
        if self.size == 1:
            return x
        out = x.clone(memory_format=torch.contiguous_format)
        sent = 2 * _bytes(x) * (self.size - 1) // self.size
        self._run_timed("all_reduce", sent, lambda: dist.all_reduce(out, group=self.handle))
        return out

    def shift(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to send x to the next rank of the ring.

        Only the wait is exposed time: what is computed between the two calls hides the rest.

        Args:
            x: the tensor to send; all ranks send the same shape.

        Returns:
            A function that waits for, and returns, the tensor of the rank before.
        """
        if self.size == 1:
            return lambda: x
        x = x.contiguous()
        out = torch.empty_like(x)
        here, from_next, from_previous = (
            self.index,
            self.ranks[(self.index + 1) % self.size],
            self.ranks[self.index - 1],
        )
        ops = [
            dist.P2POp(dist.isend, x, from_next, self.handle),
            dist.P2POp(dist.irecv, out, from_previous, self.handle),
        ]
        works = dist.batch_isend_irecv(ops if here % 2 == 0 else ops[::-1])

        def wait() -> Tensor:
            def all_of_them() -> None:
                for work in works:
                    work.wait()

            self._run_timed("shift", _bytes(x), all_of_them)
            return out

        return wait

    def send(self, x: Tensor, to: int) -> Callable[[], None]:
        """Start to send x to the rank with an index of the group; the returned function waits until it is sent."""
        x = x.contiguous()
        work = dist.isend(x, self.ranks[to], group=self.handle)
        assert work is not None
        return lambda: self._run_timed("send", _bytes(x), work.wait)

    def receive(self, out: Tensor, sender: int) -> Callable[[], Tensor]:
        """Start to receive a tensor. The wait counts as exposed time of the messages that are sent.

        Args:
            out: the tensor to fill, contiguous.
            sender: the index of the sending rank in the group.

        Returns:
            A function that waits for, and returns, the tensor.
        """
        work = dist.irecv(out, self.ranks[sender], group=self.handle)
        assert work is not None

        def wait() -> Tensor:
            self._run_timed("send", 0, work.wait)
            return out

        return wait

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """Return the x of the rank with index `source` on all ranks; the others pass a tensor of its shape."""
        if self.size == 1:
            return x
        out = x.clone(memory_format=torch.contiguous_format)
        sent = _bytes(x) * (self.size - 1) if self.index == source else 0
        self._run_timed("broadcast", sent, lambda: dist.broadcast(out, self.ranks[source], group=self.handle))
        return out

    def all_gather_uneven(self, x: Tensor, dim: int) -> Tensor:
        """Return every rank's x joined along `dim`, in which their lengths may differ."""
        if self.size == 1:
            return x
        lengths = [int(n) for n in self.all_gather(torch.tensor([x.shape[dim]], device=x.device))]
        spare = max(lengths) - x.shape[dim]
        filler = x.new_zeros([spare if d == dim % x.ndim else n for d, n in enumerate(x.shape)])
        parts = self.all_gather(torch.cat([x, filler], dim=dim))
        return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, lengths, strict=True)], dim=dim)

    def exchange_halos(self, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Send `first` to the rank before and `last` to the next one; return what those sent, zeros at the ends."""
        from_previous, from_next = first.new_zeros(first.shape), last.new_zeros(last.shape)
        previous, following = self.index - 1, self.index + 1
        self._exchange_with_neighbours(
            [(previous, first), (following, last)], [(previous, from_previous), (following, from_next)]
        )
        return from_previous, from_next

    def shift_last(self, last: Tensor) -> Tensor:
        """Send `last` to the next rank; return what the rank before sent, of the same shape; zeros on the first."""
        from_previous = last.new_zeros(last.shape)
        self._exchange_with_neighbours([(self.index + 1, last)], [(self.index - 1, from_previous)])
        return from_previous

    def _exchange_with_neighbours(
        self, sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]
    ) -> None:
        """Send and receive tensors, each with a rank's index; indices outside of the group are left out."""
        if self.size == 1:
            return
        sent = [(index, x.contiguous()) for index, x in sent if index in range(self.size)]
        received = [(index, x) for index, x in received if index in range(self.size)]
        ops = [dist.P2POp(dist.isend, x, self.ranks[index], self.handle) for index, x in sent]
        ops += [dist.P2POp(dist.irecv, x, self.ranks[index], self.handle) for index, x in received]

        def exchange() -> None:
            for work in dist.batch_isend_irecv(ops):
                work.wait()

        self._run_timed("neighbours", sum(_bytes(x) for _, x in sent), exchange)

    def _run_timed(self, kind: str, sent: int, call: Callable[[], object]) -> None:
        with self.traffic.trace.nvtx(kind):
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            end = time.perf_counter()
        self.traffic.add(kind, sent, start, end)


def single_process_group(rank: int = 0) -> Group:
    """Return a group of this rank only."""
    return Group((rank,), rank, None, TrafficCounter())


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
