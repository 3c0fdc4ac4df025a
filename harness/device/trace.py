"""The trace of one request on one rank, as events of Chrome's trace format, which Perfetto opens.

Ranges (stages, solver steps, networks, collectives) are made of the very times that the rank reports. PyTorch's
profiler adds operators and, on a GPU, kernels. Times count from a moment that all ranks know, on the machine's clock.
"""

from __future__ import annotations

import gzip
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch

RANGES = "stages, steps, networks, collectives"  # the name of the ranges' track
READINGS = 9  # of the two clocks
MAX_ALLOCATIONS = 100_000  # the most recent allocations that a snapshot of GPU memory has


def clock_offset_ns() -> int:
    """Return the clock's time minus that of Python's performance counter, ns.

    Of several readings the quickest counts: another process may run between the readings of the two clocks.
    """
    readings = []
    for _ in range(READINGS):
        before, now, after = time.perf_counter_ns(), time.time_ns(), time.perf_counter_ns()
        readings.append((after - before, now - (before + after) // 2))
    return min(readings)[1]


class NoTrace:
    """What most requests have in place of a trace: it records nothing."""

    def nvtx(self, name: str) -> AbstractContextManager[None]:
        """Return an NVTX range, or nothing without a trace or a GPU."""
        return nullcontext()

    def add(self, kind: str, name: str, start_ms: float, duration_ms: float, **details: object) -> None:
        """Add a range.

        Args:
            kind: stage, step, network or collective.
            name: the range's name.
            start_ms: begin of the range on Python's performance counter, ms.
            duration_ms: duration of the range, ms.
            **details: what a viewer shows of it.
        """

    @contextmanager
    def recording(self, wait_for_replica: Callable[[], object]) -> Iterator[None]:
        """Record operators inside the context.

        Args:
            wait_for_replica: a collective of the ranks that compute the same images. A profiler takes a while to
                start, and the first stage would show that as waiting.

        Yields:
            None, while the request runs.
        """
        yield

    def encode(self) -> bytes:
        """Return the events: JSON objects with commas between them, compressed; empty without a trace."""
        return b""

    @property
    def memory_snapshot(self) -> bytes:
        """The history of GPU memory in PyTorch's own format; empty without a trace or a GPU."""
        return b""


class RankTrace(NoTrace):
    """Records one request.

    Args:
        rank: this rank, which is the process of all its events.
        world_size: the number of ranks.
        device: the device of the networks.
        from_ns: the moment from which times count, ns since 1970.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device, from_ns: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._from_ns = from_ns
        self._counter_from_ms = (from_ns - clock_offset_ns()) / 1e6
        self._events: list[dict[str, Any]] = []
        self._tracks = {1: RANGES}
        self._snapshot = b""

    def nvtx(self, name: str) -> AbstractContextManager[None]:
        """Return an NVTX range on a GPU."""
        on_gpu: AbstractContextManager[None] = torch.cuda.nvtx.range(name) if self._on_gpu else nullcontext()
        return on_gpu

    def add(self, kind: str, name: str, start_ms: float, duration_ms: float, **details: object) -> None:
        """Add a range."""
        start_us = (start_ms - self._counter_from_ms) * 1e3
        event = {"ph": "X", "cat": kind, "name": name, "pid": self._rank, "tid": 1}
        self._events.append({**event, "ts": start_us, "dur": duration_ms * 1e3, "args": details})

    @contextmanager
    def recording(self, wait_for_replica: Callable[[], object]) -> Iterator[None]:
        """Record operators and, on a GPU, kernels and the history of memory."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        with tempfile.TemporaryDirectory(prefix="triptych-trace-") as name:
            folder = Path(name)
            with self._memory_history(folder / "memory.pickle"), profile(activities=kinds) as found:
                wait_for_replica()
                yield
            found.export_chrome_trace(str(folder / "operators.json"))
            self._add_operators(folder / "operators.json")

    @contextmanager
    def _memory_history(self, file: Path) -> Iterator[None]:
        """Record what the GPU's allocator does inside the context."""
        if not self._on_gpu:
            yield
            return
        torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS, device=self._device)
        try:
            yield
            torch.cuda.memory._dump_snapshot(str(file))
            self._snapshot = file.read_bytes()
        finally:
            torch.cuda.memory._record_memory_history(enabled=None, device=self._device)

    def _add_operators(self, file: Path) -> None:
        """Add what the profiler wrote, on this rank's tracks and clock.

        Raises:
            ValueError: the profiler could not write its file.
        """
        try:
            found = msgspec.json.decode(file.read_bytes())
        except (OSError, msgspec.DecodeError) as error:
            raise ValueError(
                f"the profiler cannot write its trace to {file.parent.parent}; free some space there, or set TMPDIR"
            ) from error
        shift_ns = found["baseTimeNanoseconds"] - self._from_ns
        tracks: dict[tuple[object, object], int] = {}
        names: dict[tuple[object, object], str] = {}
        for event in found["traceEvents"]:
            track = event["pid"], event["tid"]
            if event["ph"] == "M" and event["name"] == "thread_name":
                names[track] = event["args"]["name"]
            if event["ph"] == "M" or isinstance(event["pid"], str):
                continue  # a name, or a span of the profiler itself
            number = tracks.setdefault(track, len(tracks) + 2)
            start_us = (round(event["ts"] * 1e3) + shift_ns) / 1e3
            moved = {"pid": self._rank, "tid": number, "ts": start_us}
            if "id" in event:  # of an arrow from a call to its kernel
                moved["id"] = event["id"] * self._world_size + self._rank
            self._events.append({**event, **moved})
        self._tracks |= {number: names.get(track, f"track {number}") for track, number in tracks.items()}

    def encode(self) -> bytes:
        """Return the events of this rank."""
        process: dict[str, dict[str, object]] = {
            "process_name": {"name": f"rank {self._rank}"},
            "process_labels": {"labels": str(self._device)},
            "process_sort_index": {"sort_index": self._rank},
        }
        events = [self._name(name, 0, value) for name, value in process.items()]
        for number, name in self._tracks.items():
            events.append(self._name("thread_name", number, {"name": name}))
            events.append(self._name("thread_sort_index", number, {"sort_index": number}))
        return gzip.compress(b",\n".join(map(msgspec.json.encode, events + self._events)), compresslevel=1)

    def _name(self, kind: str, track: int, value: Mapping[str, object]) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": self._rank, "tid": track, "args": value}

    @property
    def memory_snapshot(self) -> bytes:
        """The history of GPU memory, for pytorch.org/memory_viz."""
        return self._snapshot

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"
