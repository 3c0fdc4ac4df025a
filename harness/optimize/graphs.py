"""An evaluation of the network as one launch: its kernels, recorded in a CUDA graph for every kind of input.

A kernel over the tokens of one picture can take less time than its launch, of which a network has hundreds. A kind of
input (shapes and dtypes of latent and conditioning) is evaluated plainly when it comes first, which settles what
libraries choose, compile and remember; recorded when it comes again; and replayed from then on.

Source: CUDA graphs as PyTorch offers them (Nguyen et al. 2021, "Accelerating PyTorch with CUDA Graphs").
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.utils._python_dispatch import _get_current_dispatch_mode

from models.components import Conditioning
from models.layers import holding

KINDS = 16  # of which graphs are kept, those that came last; each holds memory for one evaluation's inputs and output
TOLD = tuple(f.name for f in fields(Conditioning))

Inputs: TypeAlias = tuple[Tensor | None, ...]  # latent, tau_B, and the fields of a conditioning in their order


class Recording(Protocol):
    """A recorded run, whose inputs and output stay where they are in memory."""

    output: Tensor

    def replay(self) -> None:
        """Runs it again on what its inputs hold now."""


class CudaRecording:
    """In a CUDA graph.

    Args:
        pool: memory that graphs share, since no two run at once and no output is read after the next run.
        run: queues kernels on the GPU and does not wait for them.
    """

    def __init__(self, pool: Any, run: Callable[[], Tensor]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.output = run()

    def replay(self) -> None:
        self._graph.replay()


class Graphs(nn.Module):
    """A network (models.components.Denoiser) that is recorded and replayed; weights must stay where they are.

    While operations are counted or profiled the network runs as it is: a replay shows none.

    Args:
        network: with a forward that reads nothing of the CPU's memory once it has run (Components.recordable).
        record: makes a Recording of a run.
    """

    def __init__(self, network: nn.Module, record: Callable[[Callable[[], Tensor]], Recording] | None = None) -> None:
        super().__init__()
        self.network = network
        self._record = partial(CudaRecording, torch.cuda.graph_pool_handle()) if record is None else record
        self._kinds: OrderedDict[tuple[object, ...], _Kind] = OrderedDict()

    def forward(self, latent: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """One evaluation; the output is the caller's."""
        if _watched():
            output: Tensor = self.network(latent, tau_B, condition)
            return output
        inputs = (latent, tau_B, *(getattr(condition, name) for name in TOLD))
        name = tuple(None if x is None else (x.shape, x.dtype) for x in inputs)
        kind = self._kinds.pop(name, None) or _Kind(self.network, inputs)
        output = kind.evaluate(inputs, self._record)
        self._kinds[name] = kind
        if len(self._kinds) > KINDS:
            self._kinds.popitem(last=False)
        return output


class _Kind:
    """The evaluations of one kind of input."""

    def __init__(self, network: nn.Module, like: Inputs) -> None:
        self._network = network
        self._inputs = tuple(None if x is None else x.new_empty(x.shape) for x in like)
        self._held: list[Tensor] = []
        self._ran = False
        self._recording: Recording | None = None

    def evaluate(self, inputs: Inputs, record: Callable[[Callable[[], Tensor]], Recording]) -> Tensor:
        for mine, given in zip(self._inputs, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        if not self._ran:
            output = self._run()
            self._ran = True
            return output
        if self._recording is None:
            with holding() as self._held:
                self._recording = record(self._run)
        self._recording.replay()
        return self._recording.output.clone()

    def _run(self) -> Tensor:
        latent, tau_B, *told = self._inputs
        output: Tensor = self._network(latent, tau_B, Conditioning(**dict(zip(TOLD, told, strict=True))))
        return output


def _watched() -> bool:
    """Whether operations are counted or profiled."""
    return _get_current_dispatch_mode() is not None or profiler._is_profiler_enabled
