"""Several ranks that compute one image skip blocks in the same evaluations as one rank, and give the same image."""

import torch

from tests.fixtures.models.parity import rel_l2
from tests.fixtures.parallel.cached_blocks import DEGREES, KINDS, NAMES, SHARDED, alone, on_rank
from tests.fixtures.parallel.ranks import on_ranks


def test_every_axis_skips_what_one_rank_skips() -> None:
    with torch.inference_mode():
        cases = [*(f"{name} {kind}" for name in NAMES for kind in KINDS), SHARDED]
        expected = {case: alone(*case.split()) for case in cases}
    first, second = on_ranks(2, on_rank, {case: threshold for case, (threshold, *_) in expected.items()})
    for case, (_, output, owner) in expected.items():
        assert {True, False} == set(owner.computed[2:]), (case, owner.computed)  # so that the test can fail
        for degrees in DEGREES:
            what = f"{case} {degrees}"
            assert first[f"{what} computed"].tolist() == owner.computed, what
            assert torch.equal(first[what], second[what]), what
            assert rel_l2(first[what], output) < 1e-5, what
