"""How many bytes a rank sends to decode one latent by rows, by kind of collective, from shapes alone.

The decoder as it was written for one device is traced on the meta device. On N ranks, with s bytes a number, and
b = ceil(H / N) the rows of the highest band of H latent rows (harness.parallel.vae), a rank sends

    for every convolution of 3 rows over x of R rows
        neighbours      d s |x| / R             a row to each of its d neighbours: 1 for the outer ranks, 2 between
    for every group norm of G groups over a batch of B
        all_gather      4 (2 B G + 1) (N - 1)   means, variances and a count, in float32
    for every attention over x
        all_gather      2 s |x| b / H (N - 1)   keys and values, bands padded to the highest
        all_gather      8 (N - 1)               and how high each is
    for the pixels p, in float32
        all_gather      (4 |p| b / H + 8) (N - 1)

where |x| counts numbers; the x of a causal convolution includes the frames that it is handed from before.
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
from harness.parallel.vae import CAUSAL, FRAME_ATTENTION, RowsDecoder, halo

LENGTH = 8  # bytes of a band's height, where heights are told


@dataclass(frozen=True)
class DecodeTrace:
    """What decoding one batch of latents does that ranks send bytes for.

    Args:
        rows: H, of the latent.
        halos: of every convolution of 3 rows: numbers in a row of what it works on.
        norms: of every group norm: groups of the whole batch.
        attention: of every attention: numbers of keys and values for a latent row.
        pixels: numbers of pixels for a latent row.
    """

    rows: int
    halos: tuple[int, ...]
    norms: tuple[int, ...]
    attention: tuple[int, ...]
    pixels: int


def decode_bytes(trace: DecodeTrace, ranks: int, index: int, itemsize: int) -> dict[str, int]:
    """Bytes that one rank sends to decode once, by kind of collective, without kinds that send none.

    Args:
        trace: of the decoder and the latents.
        ranks: N.
        index: of this rank among them.
        item: s, bytes of a number of the decoder's dtype.
    """
    sent, others, highest = Counter[str](), ranks - 1, -(-trace.rows // ranks)
    neighbours = (index > 0) + (index < others)
    sent["neighbours"] += neighbours * itemsize * sum(trace.halos)
    sent["all_gather"] += sum(FLOAT32 * (2 * groups + 1) for groups in trace.norms) * others
    sent["all_gather"] += sum(itemsize * numbers * highest + LENGTH for numbers in trace.attention) * others
    sent["all_gather"] += (FLOAT32 * trace.pixels * highest + LENGTH) * others
    return {kind: count for kind, count in sent.items() if count}


def trace_decode(make: Callable[[], RowsDecoder], latent: Tensor) -> DecodeTrace:
    """Decodes once without any numbers.

    Args:
        make: builds the decoder, for one device.
        latent: of the sizes in question, on any device (meta is enough).
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
    """Listens to a decoder's layers by hooks."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.halos: list[int] = []
        self.norms: list[int] = []
        self.attention: list[int] = []

    def register_hooks(self, module: nn.Module) -> None:
        """Hooks one layer, if it is one that needs other rows."""
        if isinstance(module, (*CAUSAL, nn.Conv2d)):
            if halo(module):
                module.register_forward_pre_hook(self._convolve)
        elif isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(self._norm)
        elif isinstance(module, (*FRAME_ATTENTION, Attention)):
            module.register_forward_pre_hook(self._attend)

    def _convolve(self, conv: nn.Module, args: tuple[Any, ...]) -> None:
        numbers = sum(x.numel() for x in args if x is not None)  # causal ones are handed frames from before, too
        self.halos.append(numbers // args[0].shape[-2])

    def _norm(self, norm: nn.GroupNorm, args: tuple[Any, ...]) -> None:
        self.norms.append(len(args[0]) * norm.num_groups)

    def _attend(self, attention: nn.Module, args: tuple[Any, ...]) -> None:
        self.attention.append(2 * args[0].numel() // self.rows)
