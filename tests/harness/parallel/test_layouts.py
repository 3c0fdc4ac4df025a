"""Every layout computes what one rank computes, for every family, with uneven tokens and heads."""

from functools import cache

import pytest
import torch
from torch import Tensor

from harness.parallel.attention import TokenLayout
from models.attention import math_attention
from tests.fixtures.models.parity import rel_l2
from tests.fixtures.parallel.layouts import SIZES, cases, ranks_found
from tests.fixtures.parallel.networks import TINY


@cache
def one_rank(name: str, dtype: torch.dtype) -> Tensor:
    """Return a network's output on one rank."""
    latent, tau_B, condition = TINY[name].inputs
    with torch.inference_mode():
        return TINY[name].build(math_attention, dtype)(latent.to(dtype), tau_B, condition.to(dtype)).float()


@cache
def bound(name: str, dtype: torch.dtype) -> float:
    """Return the allowed distance from one rank in float32; in bfloat16 it is 1.5 times the distance of one rank."""
    if dtype is torch.float32:
        return 1e-5
    error = rel_l2(one_rank(name, dtype), one_rank(name, torch.float32))
    assert error > 1e-3
    return 1.5 * error


@pytest.mark.parametrize(("ranks", "more"), SIZES)
def test_every_layout_is_one_rank(ranks: int, more: bool) -> None:
    for rank, found in enumerate(ranks_found(ranks, more)):
        for name, layout in cases(ranks, more):
            error = rel_l2(found[f"{name} {layout}"], one_rank(name, torch.float32))
            assert error < bound(name, layout.dtype), (name, layout, rank, error)


@pytest.mark.parametrize(("ranks", "more"), SIZES)
def test_ranks_hold_one_output(ranks: int, more: bool) -> None:
    """All ranks agree bit for bit in both dtypes: otherwise their solvers would drift apart."""
    first, *others = ranks_found(ranks, more)
    for found in others:
        for name, layout in cases(ranks, more):
            assert torch.equal(found[f"{name} {layout}"], first[f"{name} {layout}"]), (name, layout)


def test_an_image_attends_to_itself_where_the_text_is_sharded_in_as_many_tokens() -> None:
    """7 tokens of text and 8 of an image are 4 on each rank; one of the text's is padding, none of the image's."""
    alone = TokenLayout((7, 8), 2).for_tokens(4)
    assert alone.lengths == (8,)
    assert alone.mask(None, 1, torch.device("cpu")) is None
