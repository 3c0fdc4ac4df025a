"""Bytes that a rank sends to decode one latent by rows, by kind of collective, from shapes alone.

The single-device decoder is traced on the meta device. On N ranks, with s bytes per element, and b = ceil(H / N) the
rows of the highest band of H latent rows (harness.parallel.vae), a rank sends

    for every convolution of 3 rows over x with R rows
        neighbours      d s |x| / R             a row to each of its d neighbours: 1 for the outer ranks, 2 between
    for every group norm of G groups over a batch of B
        all_gather      4 (2 B G + 1) (N - 1)   means, variances and a count, in float32
    for every attention over x
        all_gather      2 s |x| b / H (N - 1)   keys and values, bands padded to the highest
        all_gather      8 (N - 1)               and the height of each band
    for the pixels p, in float32
        all_gather      (4 |p| b / H + 8) (N - 1)

where |x| is the number of elements; the x of a causal convolution includes the earlier frames that it is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from harness.costs.traffic import FLOAT32
from harness.parallel.vae import CAUSAL, FRAME_ATTENTION, RowShardableDecoder, halo_rows

LENGTH = 8  # bytes of a band's height, which each rank sends as an int64


@dataclass(frozen=True)
class DecodeTrace:
    """The operations of decoding one batch of latents that make ranks communicate.

    Args:
        rows: H, the rows of the latent.
        halos: the elements in one row of the input of every convolution of 3 rows.
        norms: the groups in the whole batch of every group norm.
        attention: the elements of keys and values per latent row of every attention.
        pixels: the elements of pixels per latent row.
    """

    rows: int
    halos: tuple[int, ...]
    norms: tuple[int, ...]
    attention: tuple[int, ...]
    pixels: int


def decode_bytes(trace: DecodeTrace, ranks: int, index: int, itemsize: int) -> dict[str, int]:
    """Return the bytes that one rank sends to decode once, by kind of collective, without kinds that send none.

    Args:
        trace: the trace of the decoder and the latents.
        ranks: N, the number of ranks.
        index: this rank's index among them.
        itemsize: s, the bytes per element of the decoder's dtype.
    """
    sent, others, highest = Counter[str](), ranks - 1, -(-trace.rows // ranks)
    neighbours = (index > 0) + (index < others)
    sent["neighbours"] += neighbours * itemsize * sum(trace.halos)
    sent["all_gather"] += sum(FLOAT32 * (2 * groups + 1) for groups in trace.norms) * others
    sent["all_gather"] += sum(itemsize * elements * highest + LENGTH for elements in trace.attention) * others
    sent["all_gather"] += (FLOAT32 * trace.pixels * highest + LENGTH) * others
    return {kind: count for kind, count in sent.items() if count}


def trace_decode(make: Callable[[], RowShardableDecoder], latent: Tensor) -> DecodeTrace:
    """Decode once on the meta device.

    Args:
        make: a function that builds the single-device decoder.
        latent: a latent of the shape in question, on any device (meta is enough).

    Returns:
        The trace.
    """
    with torch.device("meta"):
        decoder = make()
    tracer = _DecoderTracer(latent.shape[-2])
    for module in decoder.vae.decoder.modules():
        tracer.register_hooks(module)
    with torch.no_grad():
        pixels = decoder(latent.to("meta"))
    rows = latent.shape[-2]
    return DecodeTrace(rows, tuple(tracer.halos), tuple(tracer.norms), tuple(tracer.attention), pixels.numel() // rows)


class _DecoderTracer:
    """Observes a decoder's layers through hooks."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.halos: list[int] = []
        self.norms: list[int] = []
        self.attention: list[int] = []

    def register_hooks(self, module: nn.Module) -> None:
        """Register a hook on one layer, if it needs other rows."""
        if isinstance(module, (*CAUSAL, nn.Conv2d)):
            if halo_rows(module):
                module.register_forward_pre_hook(self._convolve)
        elif isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(self._norm)
        elif isinstance(module, (*FRAME_ATTENTION, Attention)):
            module.register_forward_pre_hook(self._attend)

    def _convolve(self, conv: nn.Module, args: tuple[Any, ...]) -> None:
        elements = sum(x.numel() for x in args if x is not None)  # causal convolutions also get earlier frames
        self.halos.append(elements // args[0].shape[-2])

    def _norm(self, norm: nn.GroupNorm, args: tuple[Any, ...]) -> None:
        self.norms.append(len(args[0]) * norm.num_groups)

    def _attend(self, attention: nn.Module, args: tuple[Any, ...]) -> None:
        self.attention.append(2 * args[0].numel() // self.rows)
