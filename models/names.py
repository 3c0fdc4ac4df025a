"""Weight names as data: the one-to-one map between a published checkpoint's names and a network's own."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class NameMap:
    """A one-to-one map between published and native tensor names.

    `attn.to_out.0` matches in `blocks.3.attn.to_out.0.weight`, but not in `attn.to_out.01`. Names without a pair are
    the same in both.

    Args:
        pairs: Pairs (published, native) of dotted name segments, applied in order to whole segments of a name.
    """

    pairs: tuple[tuple[str, str], ...] = ()

    def to_native(self, name: str) -> str:
        """Return the network's own name of a published tensor."""
        return _rename(name, self.pairs)

    def to_published(self, name: str) -> str:
        """Return the published name of one of the network's tensors."""
        return _rename(name, tuple((own, published) for published, own in reversed(self.pairs)))


def _rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        name = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", name)
    return name
