"""Every layout of tokens and linears computes what one rank computes, for every family, uneven tokens and heads too."""

from functools import cache

import pytest
import torch
from torch import Tensor

from harness.parallel.attention import TokenLayout
from models.attention import math_attention
from tests.models.parity import rel_l2
from tests.parallel.layouts import layouts, ranks_found
from tests.parallel.networks import TINY


@cache
def one_rank(name: str) -> Tensor:
    """A network's output on one rank, in float32."""
    with torch.inference_mode():
        return TINY[name].build(math_attention)(*TINY[name].inputs)


@pytest.mark.parametrize("ranks", [2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_layout_is_one_rank(ranks: int) -> None:
    for rank, found in enumerate(ranks_found(ranks)):
        for layout in layouts(ranks):
            bound = 1e-5 if layout.dtype is torch.float32 else 0.1
            for name in TINY:
                error = rel_l2(found[f"{name} {layout}"], one_rank(name))
                assert error < bound, (name, layout, rank, error)


def test_a_picture_attends_to_itself_where_the_text_is_dealt_in_as_many_tokens() -> None:
    """7 tokens of text and 8 of a picture are 4 a rank both; one of the text's is padding, none of the picture's."""
    alone = TokenLayout((7, 8), 2).of(4)
    assert alone.lengths == (8,)
    assert alone.mask(None, 1, torch.device("cpu")) is None
