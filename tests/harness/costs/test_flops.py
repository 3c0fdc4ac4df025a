"""The formulas of a layout's operations and weights match what a sharded network does and holds, for every network."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from harness.costs.flops import rank_flops
from harness.costs.memory import network_weights
from harness.costs.traffic import trace_network
from harness.device.flops import count_operations
from harness.parallel.group import Group, TrafficCounter
from harness.parallel.mesh import world_size
from harness.parallel.parallelize import shard_linears, shard_tokens
from harness.parallel.process_groups import ProcessGroups
from models.attention import math_attention
from models.attention.lse import math_lse
from tests.fixtures.parallel.networks import TINY


class Silent(Group):
    """Return the first rank of an unconnected group: shapes are right, numbers are not."""

    def __init__(self, size: int) -> None:
        super().__init__(range(size), 0, None, TrafficCounter())

    def shift(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: x

    def _run_timed(self, kind: str, sent: int, call: Callable[[], object]) -> None:
        pass


def silent(degrees: Sequence[int]) -> ProcessGroups:
    """Return the process groups of the first rank of a layout."""
    _, cfg, tp, ring, ulysses = (Silent(size) for size in degrees)
    tokens = Silent(ring.size * ulysses.size)
    weights, image = Silent(cfg.size * tokens.size), Silent(world_size(degrees))
    return ProcessGroups(cfg, tp, ring, ulysses, tokens, weights, image, tokens.traffic, lambda flag: flag)


CASES = ((1, 1, 1, 1, 1), (1, 1, 2, 1, 1), (1, 1, 1, 3, 1), (1, 1, 1, 1, 3), (1, 1, 2, 1, 2), (1, 1, 1, 2, 2))


@pytest.mark.parametrize("name", TINY)
def test_a_rank_does_and_holds_what_the_formulas_say(name: str) -> None:
    tiny = TINY[name]
    trace = trace_network(lambda: tiny.make(math_attention), tiny.plan, tiny.inputs)
    weights = network_weights(tiny.make(math_attention), tiny.plan)
    for degrees in CASES:
        if tiny.heads() % degrees[2] or degrees[4] > tiny.heads() // degrees[2]:
            continue
        network, groups, flops = tiny.build(math_attention), silent(degrees), []
        shard_linears(network, tiny.plan, groups.tp)
        shard_tokens(network, tiny.plan, math_attention, math_lse, groups)
        with torch.no_grad(), count_operations(flops.append):
            network(*tiny.inputs)
        assert flops == [rank_flops(trace, degrees)], degrees
        held = sum(parameter.nbytes for parameter in network.parameters())
        assert held == weights.per_rank(degrees[2]), degrees
