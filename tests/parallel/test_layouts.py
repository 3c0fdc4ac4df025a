"""Every layout of tokens and linears computes what one rank computes, for every family, uneven tokens and heads too."""

import pytest
import torch

from models.attention import math_attention
from tests.models.parity import rel_l2
from tests.parallel.layouts import forward
from tests.parallel.networks import TINY
from tests.parallel.ranks import on_ranks

LAYOUTS: dict[
    int, list[tuple[tuple[int, ...], bool]]
] = {  # by world size: degrees (dp, cfg, tp, ring, ulysses), gather
    2: [((1, 1, 2, 1, 1), False), ((1, 1, 1, 2, 1), False), ((1, 1, 1, 2, 1), True), ((1, 1, 1, 1, 2), False)],
    3: [((1, 1, 1, 3, 1), False), ((1, 1, 1, 1, 3), False)],
    4: [
        ((1, 1, 2, 1, 2), False),
        ((1, 1, 2, 2, 1), False),
        ((1, 1, 1, 2, 2), False),
        ((1, 1, 1, 2, 2), True),
        ((1, 1, 1, 1, 4), False),
    ],
    8: [((1, 1, 2, 2, 2), False), ((1, 1, 1, 2, 4), False)],
}


@pytest.mark.parametrize("ranks", [2, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def test_every_layout_is_one_rank(ranks: int) -> None:
    cases = [(name, degrees, gather) for name in TINY for degrees, gather in LAYOUTS[ranks]]
    with torch.inference_mode():
        alone = {name: tiny.build(math_attention)(*tiny.inputs) for name, tiny in TINY.items()}
    for rank, found in enumerate(on_ranks(ranks, forward, cases)):
        for name, degrees, gather in cases:
            error = rel_l2(found[f"{name} {degrees} {gather}"], alone[name])
            assert error < 1e-5, (name, degrees, gather, rank, error)
