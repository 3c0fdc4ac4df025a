"""Weight names as data: how a published checkpoint's names and a network's own map onto each other, one to one."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class NameMap:
    """Pairs (published, ours) of dotted name parts, applied in order to whole parts of a name.

    `attn.to_out.0` matches in `blocks.3.attn.to_out.0.weight`, but not in `attn.to_out.01`. Names without a pair are
    the same on both sides.
    """

    pairs: tuple[tuple[str, str], ...] = ()

    def ours(self, name: str) -> str:
        """The network's name of a published tensor."""
        return _rename(name, self.pairs)

    def theirs(self, name: str) -> str:
        """The published name of one of the network's tensors."""
        return _rename(name, tuple((ours, theirs) for theirs, ours in reversed(self.pairs)))


def _rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        name = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", name)
    return name
