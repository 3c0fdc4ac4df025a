"""What each rank of a layout computes of one network: the output, the traffic, the padding."""

import torch
from torch import Tensor

from harness.parallel.connect import connect
from harness.parallel.mesh import Place
from harness.parallel.parallelize import cut_linears, deal_tokens
from models.attention import math_attention
from models.attention.lse import math_lse
from tests.parallel.networks import TINY


def forward(rank: int, size: int, cases: list[tuple[str, tuple[int, ...], bool]]) -> dict[str, Tensor]:
    """Every case (network, degrees, gather) of this world size, one after another."""
    found = {}
    for name, degrees, gather in cases:
        axes = connect(Place(rank, degrees), torch.device("cpu"))
        tiny = TINY[name]
        network = tiny.build(math_attention)
        cut_linears(network, tiny.plan, axes.tp)
        deal_tokens(network, tiny.plan, math_attention, math_lse, axes, gather)
        found[f"{name} {degrees} {gather}"] = network(*tiny.inputs)
    return found
