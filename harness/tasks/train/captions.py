"""What is written under a picture: name, style and tags in a few fixed forms, and the empty caption for guidance."""

from collections.abc import Sequence

import torch

TAGS_SHOWN = 6  # tags of a name that captions use
TEMPLATES = ("{}", "a {}", "the {}", "{} emoji", "an emoji of a {}", "a picture of a {}", "{} icon")


def caption(name: str, style: str | None = None, tag: str | None = None) -> str:
    """``name``, or ``name, tag``, or ``name, style``, or ``name, tag, style``."""
    return ", ".join(part for part in (name, tag, style) if part)


def variants(name: str, style: str, tags: Sequence[str]) -> list[str]:
    """Every caption of one picture: without and with its style, for no tag and for each of the first tags."""
    shown: list[str | None] = [None, *tags[:TAGS_SHOWN]]
    return [caption(name, style_, tag) for style_ in (None, style) for tag in shown]


def draw(tags: Sequence[str], style_share: float, tag_share: float, empty_share: float, u: torch.Tensor) -> int | None:
    """Which of ``variants`` a picture gets, or None for the empty caption; ``u`` is four uniform numbers."""
    drop, with_style, with_tag, which = u.tolist()
    if drop < empty_share:
        return None
    shown = min(len(tags), TAGS_SHOWN)
    tag = 1 + int(which * shown) if shown and with_tag < tag_share else 0
    return tag + (1 + shown if with_style < style_share else 0)
