"""What the block caches of one request store between evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from harness.parallel.attention import TokenLayout

StreamKey = tuple[str, str]
"""The name of a stack of blocks, and the name of one of its token streams."""

TaylorTerms = Mapping[StreamKey, Sequence[Tensor]]
"""Differences d_0, d_1, ... of what a stack adds to a stream, by stream."""


@dataclass(eq=False)
class CacheState:
    """What a block cache stores of one image from evaluation to evaluation.

    Args:
        is_last_step: whether the next evaluation belongs to the last solver step; set by the denoising loop.
        computed: whether each evaluation so far was computed.
        accumulated_change: what the skip policy has added up since the last computed evaluation.
        signal: the skip signal that the next one is compared with, the rows of this image.
        layout: how tokens were sharded in the last computed evaluation.
        taylor_terms: the differences d_0, d_1, ... by stack and stream.
    """

    is_last_step: bool = False
    computed: list[bool] = field(default_factory=list)
    accumulated_change: float = 0.0
    signal: Tensor | None = None
    layout: TokenLayout | None = None
    taylor_terms: TaylorTerms = field(default_factory=dict)

    @property
    def steps_since_computed(self) -> int:
        """Evaluations from the last computed one to the next one; 0 if none was computed."""
        return 1 + self.computed[::-1].index(True) if True in self.computed else 0
