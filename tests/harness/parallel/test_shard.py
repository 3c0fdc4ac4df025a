"""Sharded weights change only where numbers are stored: same outputs, a part of the memory, traffic by its formula."""

from datetime import timedelta
from functools import cache
from itertools import groupby

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from harness.costs.traffic import gathered_weights, weight_bytes
from harness.parallel.fsdp import TRAFFIC_KIND, apply_fsdp
from harness.parallel.mesh import RankPosition
from harness.parallel.parallelize import shard_linears, shard_tokens
from harness.parallel.process_groups import ProcessGroups, make_process_groups
from models.attention import math_attention
from models.attention.lse import math_lse
from models.blocks import wrap_runners
from tests.fixtures.parallel.layouts import POINT, branches
from tests.fixtures.parallel.networks import TINY, Tiny
from tests.fixtures.parallel.ranks import on_ranks

LAYOUTS = {
    2: [(1, 2, 1, 1, 1), (1, 1, 1, 1, 2)],
    3: [(1, 1, 1, 3, 1)],
    4: [(1, 2, 1, 1, 2), (1, 1, 2, 2, 1)],
}
CASES = {
    ranks: [
        (name, degrees, dtype)
        for degrees in layouts
        for dtype in ((torch.float32,) if ranks == 2 else (torch.float32, torch.bfloat16))
        for name in TINY
        if TINY[name].heads() % degrees[2] == 0
    ]
    for ranks, layouts in LAYOUTS.items()
}


def forward(rank: int, size: int) -> dict[str, Tensor]:
    """Return the outputs with whole and with sharded weights, the bytes sent for the latter, and the numbers held."""
    found = {}
    for degrees, cases in groupby(CASES[size], key=lambda case: case[1]):
        groups = make_process_groups(RankPosition(rank, degrees), torch.device("cpu"), timedelta(seconds=60))
        for name, _, dtype in cases:
            found |= {f"{name} {degrees} {dtype} {what}": x for what, x in both(TINY[name], dtype, groups).items()}
    return found


def both(tiny: Tiny, dtype: torch.dtype, groups: ProcessGroups) -> dict[str, Tensor]:
    """Return one network with whole weights, then with sharded ones."""
    network = tiny.build(math_attention, dtype)
    said = weight_bytes(gathered_weights(network, tiny.plan), groups.weights.size, groups.tp.size)
    shard_linears(network, tiny.plan, groups.tp)
    wrap_runners(network, tiny.plan, shard_tokens(network, tiny.plan, math_attention, math_lse, groups))
    latent, tau_B, condition = tiny.inputs

    def output() -> Tensor:
        output = network(latent.to(dtype), tau_B, condition.to(dtype)).float()
        return branches(tiny.inputs, groups.cfg).combine(output, POINT)

    def numbers() -> int:
        kept = [p for name in tiny.plan.called_outside for p in network.get_submodule(name).parameters()]
        held = [p.to_local() if isinstance(p, DTensor) else p for p in network.parameters()]
        return sum(p.numel() for p in held) - sum(p.numel() for p in kept)

    whole, before = output(), numbers()
    apply_fsdp(network, tiny.plan, groups.weights, torch.device("cpu"))
    groups.traffic.reset()
    return {
        "whole": whole,
        "sharded": output(),
        "again": output(),
        "sent": torch.tensor([groups.traffic.sent_bytes[TRAFFIC_KIND], 2 * said]),
        "held": torch.tensor([numbers(), before]),
    }


RANKS = [pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 3, 4)]


@cache
def found(ranks: int) -> list[dict[str, Tensor]]:
    return on_ranks(ranks, forward)


@pytest.mark.parametrize("ranks", RANKS)
def test_sharded_weights_give_the_same_numbers(ranks: int) -> None:
    for of_rank in found(ranks):
        for case in CASES[ranks]:
            name, degrees, dtype = case
            outputs = [of_rank[f"{name} {degrees} {dtype} {kind}"] for kind in ("whole", "sharded", "again")]
            assert torch.equal(outputs[0], outputs[1]), case
            assert torch.equal(outputs[0], outputs[2]), case


@pytest.mark.parametrize("ranks", RANKS)
def test_sharded_weights_send_what_the_formula_says(ranks: int) -> None:
    for of_rank in found(ranks):
        for name, degrees, dtype in CASES[ranks]:
            sent, said = of_rank[f"{name} {degrees} {dtype} sent"].tolist()
            assert sent == said > 0, (name, degrees, dtype)


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_hold_the_weights_once(ranks: int) -> None:
    for name, degrees, dtype in CASES[ranks]:
        held, numbers = torch.stack([of_rank[f"{name} {degrees} {dtype} held"] for of_rank in found(ranks)]).unbind(1)
        assert int(held.sum()) == int(numbers[0]) * degrees[2], (name, degrees)
        assert int(held[0]) < 0.6 * int(numbers[0]), (name, degrees)
