"""Captions of an image: name, style and tags in a few fixed forms, and the empty caption for guidance."""

from collections.abc import Sequence

import torch

TAGS_PER_NAME = 6  # tags of a name that captions use
TEMPLATES = ("{}", "a {}", "the {}", "{} emoji", "an emoji of a {}", "a picture of a {}", "{} icon")


def caption(name: str, style: str | None = None, tag: str | None = None) -> str:
    """Return ``name``, ``name, tag``, ``name, style`` or ``name, tag, style``."""
    return ", ".join(part for part in (name, tag, style) if part)


def variants(name: str, style: str, tags: Sequence[str]) -> list[str]:
    """Return every caption of one image: without and with its style, for no tag and for each of its first tags."""
    shown: list[str | None] = [None, *tags[:TAGS_PER_NAME]]
    return [caption(name, style_, tag) for style_ in (None, style) for tag in shown]


def sample_caption(
    tags: Sequence[str], style_share: float, tag_share: float, empty_share: float, u: torch.Tensor
) -> int | None:
    """Choose the caption of an image at random.

    Args:
        tags: Tags of the image.
        style_share: Probability of a caption with the style.
        tag_share: Probability of a caption with a tag.
        empty_share: Probability of the empty caption.
        u: Four uniform random numbers in [0, 1).

    Returns:
        The index of the caption in ``variants``, or None for the empty caption.
    """
    drop, with_style, with_tag, which = u.tolist()
    if drop < empty_share:
        return None
    shown = min(len(tags), TAGS_PER_NAME)
    tag = 1 + int(which * shown) if shown and with_tag < tag_share else 0
    return tag + (1 + shown if with_style < style_share else 0)
