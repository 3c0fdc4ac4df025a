"""An evaluation of a network or decoder as one launch: its kernels, recorded in a CUDA graph for every kind of input.

A kernel over the tokens of one image can take less time than its launch, and a network has hundreds of kernels. A kind
of input (shapes and dtypes) runs without a graph the first time, which settles what libraries choose, compile and
cache. The second time it is recorded, and from then on it is replayed.

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
from models.layers import collect_cached_tensors

MAX_GRAPHS = 16
"""Kinds of input whose graphs are stored, the most recent ones; each holds memory for one run's inputs and output."""
MAX_DECODED_PIXELS = 4 * 512**2
"""The most pixels that are decoded in a graph, which holds memory for them: 4 images of 512 x 512."""
CONDITION_FIELDS = tuple(f.name for f in fields(Conditioning))
"""The fields of a conditioning, in their order."""

Inputs: TypeAlias = tuple[Tensor | None, ...]
"""The inputs of a network: latent, tau_B, and the fields of a conditioning in their order."""


class Recording(Protocol):
    """A recorded run, whose inputs and output keep their place in memory.

    Attributes:
        output: the output of the last run.
    """

    output: Tensor

    def replay(self) -> None:
        """Run again on the current values of the inputs."""


GraphRecorder: TypeAlias = Callable[[Callable[[], Tensor]], Recording]
"""Makes a Recording of a run."""


class CudaRecording:
    """A run recorded in a CUDA graph.

    Args:
        run: queues kernels on the GPU, and does not wait for them.
        pool: the memory that graphs share, since no two run at once and no output is read after the next run.
    """

    def __init__(self, run: Callable[[], Tensor], pool: Any) -> None:
        self._cuda_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._cuda_graph, pool=pool, capture_error_mode="thread_local"):
            self.output = run()

    def replay(self) -> None:
        """Launch the graph."""
        self._cuda_graph.replay()


def cuda_graph_recorder() -> GraphRecorder:
    """Return a recorder of CUDA graphs that share their memory."""
    return partial(CudaRecording, pool=torch.cuda.graph_pool_handle())


class ReplayedFunction:
    """A function of tensors that is run, recorded and replayed.

    Other tensors that it reads must keep their place in memory. While operations are counted or profiled it runs as it
    is, because a replay shows no operations.

    Args:
        run: the function; after a first run with some shapes and dtypes it reads nothing from CPU memory.
        record: makes a Recording of a run.
    """

    def __init__(self, run: Callable[[Inputs], Tensor], record: GraphRecorder) -> None:
        self._run = run
        self._record = record
        self._graphs: OrderedDict[tuple[object, ...], _ShapeGraph] = OrderedDict()

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the output, which belongs to the caller."""
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
    """The graph of one kind of input."""

    def __init__(self, run: Callable[[Inputs], Tensor], like: Inputs) -> None:
        self._inputs = tuple(None if x is None else x.new_empty(x.shape) for x in like)
        self._run = partial(run, self._inputs)
        self._ran = False
        self._held: list[Tensor] = []
        self._recording: Recording | None = None

    def __call__(self, inputs: Inputs, record: GraphRecorder) -> Tensor:
        for buffer, value in zip(self._inputs, inputs, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value)
        if not self._ran:
            output = self._run()
            self._ran = True
            return output
        if self._recording is None:
            with collect_cached_tensors() as self._held:
                self._recording = record(self._run)
        self._recording.replay()
        return self._recording.output.clone()


class RecordedNetwork(nn.Module):
    """A network (models.components.Denoiser) whose evaluations are replayed.

    Args:
        network: a network whose components are marked as recordable.
        record: makes a Recording of a run.
    """

    def __init__(self, network: nn.Module, record: GraphRecorder) -> None:
        super().__init__()
        self.network = network
        self._replayed = ReplayedFunction(self._run, record)

    def forward(self, latent: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        """Evaluate the network."""
        return self._replayed((latent, tau_B, *(getattr(condition, key) for key in CONDITION_FIELDS)))

    def _run(self, inputs: Inputs) -> Tensor:
        latent, tau_B, *condition_fields = inputs
        output: Tensor = self.network(
            latent, tau_B, Conditioning(**dict(zip(CONDITION_FIELDS, condition_fields, strict=True)))
        )
        return output


class RecordedDecoder:
    """An image decoder (models.components.Decoder) that is replayed for few small images.

    Larger ones keep a GPU busy without a graph.

    Args:
        decoder: the decoder of a KL autoencoder.
        record: makes a Recording of a run.
    """

    def __init__(self, decoder: KLDecoder, record: GraphRecorder) -> None:
        self.decoder = decoder
        self._replayed = ReplayedFunction(lambda inputs: decoder(*(x for x in inputs if x is not None)), record)

    def __call__(self, latent_BCHW: Tensor) -> Tensor:
        """Return the pixels (B, 3, height, width), float32 in [0, 1]."""
        pixels = latent_BCHW[:, 0].numel() * self.decoder.stride**2
        return self.decoder(latent_BCHW) if pixels > MAX_DECODED_PIXELS else self._replayed((latent_BCHW,))


def _is_traced() -> bool:
    """Return whether operations are counted or profiled."""
    return _get_current_dispatch_mode() is not None or profiler._is_profiler_enabled
