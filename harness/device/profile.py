"""The time of a network by operator, as PyTorch's profiler measures it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from harness.messages import OperatorTime


@contextmanager
def profile_operators(add: Callable[[list[OperatorTime]], None]) -> Iterator[None]:
    """Time the operators that run inside the context; this is slower, so nothing else is timed at the same time."""
    on_cuda = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=kinds) as found:
        yield
    rows = found.key_averages()
    add(
        [
            OperatorTime(row.key, row.count, (row.self_device_time_total if on_cuda else row.self_cpu_time_total) / 1e3)
            for row in rows
        ]
    )
