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


JOINT_ATTENTION = (
    ("attn.to_q", "heads.to_q"),
    ("attn.to_k", "heads.to_k"),
    ("attn.to_v", "heads.to_v"),
    ("attn.norm_q", "heads.norm_q"),
    ("attn.norm_k", "heads.norm_k"),
    ("attn.to_out.0", "to_out"),
    ("attn.add_q_proj", "text_heads.to_q"),
    ("attn.add_k_proj", "text_heads.to_k"),
    ("attn.add_v_proj", "text_heads.to_v"),
    ("attn.norm_added_q", "text_heads.norm_q"),
    ("attn.norm_added_k", "text_heads.norm_k"),
    ("attn.to_add_out", "text_to_out"),
)
"""diffusers' names of an attention over image and text tokens together, in a block of two streams."""
LEGACY_NAMES = NameMap(
    (
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("proj_attn", "to_out.0"),
        ("time_proj.W", "time_proj.weight"),
    )
)
"""Names in checkpoints from before 2023 (attention layers, NCSN++'s frequencies), and those of diffusers today."""
