"""Captions: every variant is reachable, and the shares of style, tag and empty caption are the configured ones."""

from collections import Counter

import pytest
import torch

from harness.tasks.train.captions import sample_caption, variants


def test_variants_are_name_tag_and_style() -> None:
    assert variants("red apple", "3d", ("fruit", "health")) == [
        "red apple",
        "red apple, fruit",
        "red apple, health",
        "red apple, 3d",
        "red apple, fruit, 3d",
        "red apple, health, 3d",
    ]
    assert variants("ring", "noto", ()) == ["ring", "ring, noto"]


def test_shares_are_the_configured_ones() -> None:
    tags = ("fruit", "health")
    lines = variants("red apple", "3d", tags)
    uniform = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0))
    generated = Counter(sample_caption(tags, 0.5, 0.2, 0.1, u) for u in uniform)
    assert set(generated) == {None, *range(len(lines))}
    total = sum(generated.values())
    styled = sum(count for i, count in generated.items() if i is not None and "3d" in lines[i])
    tagged = sum(
        count for i, count in generated.items() if i is not None and ("fruit" in lines[i] or "health" in lines[i])
    )
    assert generated[None] / total == pytest.approx(0.1, abs=0.01)
    assert styled / total == pytest.approx(0.45, abs=0.01)
    assert tagged / total == pytest.approx(0.18, abs=0.01)


def test_an_image_without_tags_still_has_captions() -> None:
    assert sample_caption((), 0.0, 1.0, 0.0, torch.full((4,), 0.5)) == 0
    assert sample_caption((), 1.0, 1.0, 0.0, torch.full((4,), 0.5)) == 1
