"""What the block caches of one request keep between evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from harness.parallel.attention import TokenLayout

Place = tuple[str, str]  # a stack and a stream of it


Terms = Mapping[Place, Sequence[Tensor]]


@dataclass(eq=False)
class History:
    """What is kept of one picture from evaluation to evaluation.

    Args:
        final: the evaluation that comes belongs to the last solver step; whoever steps says so.
        computed: of every evaluation so far, whether it was.
        change: what the rule has added up since the last computed one.
        signal: what the rule was shown and compares with, the picture's rows of it.
        layout: how tokens were dealt in the last computed one.
        terms: d_0, d_1 ... by stack and stream.
    """

    final: bool = False
    computed: list[bool] = field(default_factory=list)
    change: float = 0.0
    signal: Tensor | None = None
    layout: TokenLayout | None = None
    terms: Terms = field(default_factory=dict)

    @property
    def behind(self) -> int:
        """Evaluations from the last computed one to the one that comes; 0 where none was computed."""
        return 1 + self.computed[::-1].index(True) if True in self.computed else 0
