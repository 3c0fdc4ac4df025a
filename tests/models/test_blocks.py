"""A stack of blocks runs them in order, and features wrap round its runner from the blocks outwards."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from models.blocks import BlockStack, Runner, Shared, Streams, wrap_runners
from models.plan import Dims, ParallelPlan, Stack

PLAN = ParallelPlan(stacks=(Stack("blocks", {"x_BLD": Dims(tokens=1), "text_BSD": Dims(tokens=1), "time_BD": Dims()}),))


class Affine(nn.Module):
    """Multiplies one stream, which depends on the order of blocks, and adds to the other."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(factor), requires_grad=False)

    def forward(self, x_BLD: Tensor, text_BSD: Tensor, time_BD: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight * x_BLD + time_BD, text_BSD + self.weight


class Network(nn.Module):
    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self) -> list[float]:
        streams = {"x_BLD": torch.tensor(1.0), "text_BSD": torch.tensor(0.0)}
        return [float(x) for x in self.blocks(streams, {"time_BD": torch.tensor(1.0)}).values()]


class Feature:
    """Adds one to the first stream after the blocks, or doubles it."""

    def __init__(self, doubles: bool) -> None:
        self.doubles = doubles

    def wrap(self, stack: Stack, inner: Runner) -> Runner:
        def run(blocks: Sequence[nn.Module], streams: Streams, shared: Shared) -> Streams:
            streams = inner(blocks, streams, shared)
            x = streams["x_BLD"]
            return {**streams, "x_BLD": 2 * x if self.doubles else x + 1}

        return run


def network() -> Network:
    return Network(BlockStack([Affine(2.0), Affine(3.0)]))


def test_a_stack_runs_its_blocks_in_order_and_names_weights_like_a_list() -> None:
    made = network()
    assert made() == [10.0, 5.0]  # 3 (2 + 1) + 1, not 2 (3 + 1) + 1
    assert list(made.state_dict()) == ["blocks.0.weight", "blocks.1.weight"]


def test_features_wrap_from_the_blocks_outwards() -> None:
    made = network()
    wrap_runners(made, PLAN, Feature(doubles=False), None, Feature(doubles=True))
    assert made()[0] == 22.0
    wrap_runners(made, PLAN, Feature(doubles=False))
    assert made()[0] == 23.0


def test_a_plan_that_names_a_plain_list_is_refused() -> None:
    with pytest.raises(TypeError, match="blocks is a ModuleList, not a BlockStack"):
        wrap_runners(Network(nn.ModuleList([Affine(2.0)])), PLAN, Feature(doubles=True))
