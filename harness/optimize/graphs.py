"""A network's evaluation, or a decoder's, as one launch: its kernels, recorded in a CUDA graph for every kind of input.

A kernel over the tokens of one picture can take less time than its launch, of which a network has hundreds. A kind of
input (shapes and dtypes) is run plainly when it comes first, which settles what libraries choose, compile and remember;
recorded when it comes again; and replayed from then on.

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
from models.decoders import KLDecoder
from models.layers import holding

MAX_GRAPHS = 16  # of which graphs are kept, those that came last; each holds memory for one run's inputs and output
MAX_DECODED_PIXELS = (
    4 * 512**2
)  # pixels of pictures that are decoded in a graph, which keeps memory for them: 4 of 512 x 512
CONDITION_FIELDS = tuple(f.name for f in fields(Conditioning))

Inputs: TypeAlias = tuple[Tensor | None, ...]  # of a network: latent, tau_B, and a conditioning's fields in their order


class Recording(Protocol):
    """A recorded run, whose inputs and output stay where they are in memory."""

    output: Tensor

    def replay(self) -> None:
        """Runs it again on what its inputs hold now."""


GraphRecorder: TypeAlias = Callable[[Callable[[], Tensor]], Recording]


class CudaRecording:
    """In a CUDA graph.

    Args:
        run: queues kernels on the GPU and does not wait for them.
        pool: memory that graphs share, since no two run at once and no output is read after the next run.
    """

    def __init__(self, run: Callable[[], Tensor], pool: Any) -> None:
        self._cuda_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._cuda_graph, pool=pool, capture_error_mode="thread_local"):
            self.output = run()

    def replay(self) -> None:
        self._cuda_graph.replay()


def cuda_graph_recorder() -> GraphRecorder:
    """Records in CUDA graphs that share their memory."""
    return partial(CudaRecording, pool=torch.cuda.graph_pool_handle())


class ReplayedFunction:
    """A function of tensors that is run, recorded and replayed; a tensor that it reads beside them must stay in place.

    While operations are counted or profiled it runs as it is: a replay shows none.

    Args:
        run: reads nothing of the CPU's memory once it has run on tensors of these shapes and dtypes.
        record: makes a Recording of a run.
    """

    def __init__(self, run: Callable[[Inputs], Tensor], record: GraphRecorder) -> None:
        self._run = run
        self._record = record
        self._graphs: OrderedDict[tuple[object, ...], _ShapeGraph] = OrderedDict()

    def __call__(self, inputs: Inputs) -> Tensor:
        """The output, which is the caller's."""
        if _is_traced():
            return self._run(inputs)
        key = tuple(None if x is None else (x.shape, x.dtype) for x in inputs)
        graph = self._graphs.pop(key, None) or _ShapeGraph(self._run, inputs)
        output = graph(inputs, self._record)
        self._graphs[key] = graph
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return output


class _ShapeGraph:
    """Of one kind of input."""

    def __init__(self, run: Callable[[Inputs], Tensor], like: Inputs) -> None:
        self._inputs = tuple(None if x is None else x.new_empty(x.shape) for x in like)
        self._run = partial(run, self._inputs)
        self._ran = False
        self._held: list[Tensor] = []
        self._recording: Recording | None = None

    def __call__(self, inputs: Inputs, record: GraphRecorder) -> Tensor:
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


class RecordedNetwork(nn.Module):
    """A network (models.components.Denoiser) whose evaluations are replayed.

    Args:
        network: with Components.recordable.
        record: makes a Recording of a run.
    """

    def __init__(self, network: nn.Module, record: GraphRecorder) -> None:
        super().__init__()
        self.network = network
        self._replayed = ReplayedFunction(self._run, record)

    def forward(self, latent: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """One evaluation."""
        return self._replayed((latent, tau_B, *(getattr(condition, key) for key in CONDITION_FIELDS)))

    def _run(self, inputs: Inputs) -> Tensor:
        latent, tau_B, *condition_fields = inputs
        output: Tensor = self.network(
            latent, tau_B, Conditioning(**dict(zip(CONDITION_FIELDS, condition_fields, strict=True)))
        )
        return output


class RecordedDecoder:
    """A decoder of pictures (models.components.Decoder), replayed where they are few and small; others keep a GPU busy
    as it is.

    Args:
        decoder: of a KL autoencoder.
        record: makes a Recording of a run.
    """

    def __init__(self, decoder: KLDecoder, record: GraphRecorder) -> None:
        self.decoder = decoder
        self._replayed = ReplayedFunction(lambda inputs: decoder(*(x for x in inputs if x is not None)), record)

    def __call__(self, latent_BCHW: Tensor) -> Tensor:
        """Pixels (B, 3, height, width), float32 in [0, 1]."""
        pixels = latent_BCHW[:, 0].numel() * self.decoder.stride**2
        return self.decoder(latent_BCHW) if pixels > MAX_DECODED_PIXELS else self._replayed((latent_BCHW,))


def _is_traced() -> bool:
    """Whether operations are counted or profiled."""
    return _get_current_dispatch_mode() is not None or profiler._is_profiler_enabled
