"""What each rank of a layout computes of one network, and what it sends for that."""

from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from itertools import groupby

import pytest
import torch
from torch import Tensor

from harness.parallel.group import Group
from harness.parallel.mesh import AXES, RankPosition, world_size
from harness.parallel.parallelize import shard_linears, shard_tokens
from harness.parallel.process_groups import make_process_groups
from harness.pipeline.guidance import Branches
from harness.pipeline.state import ImageSpec, Sample
from models.attention import math_attention
from models.attention.lse import math_lse
from models.components import Conditioning
from tests.parallel.networks import TINY, Inputs
from tests.parallel.ranks import on_ranks


@dataclass(frozen=True)
class Layout:
    """One way to deal a network.

    Args:
        degrees: of dp, cfg, tp, ring and ulysses.
        gather: the ring gathers keys and values at once.
        dtype: of the network.
    """

    degrees: tuple[int, ...]
    gather: bool = False
    dtype: torch.dtype = torch.float32

    def fits(self, heads: int) -> bool:
        """Whether a network of so many attention heads can be cut so."""
        return heads % self.degrees[AXES.index("tp")] == 0


LAYOUTS = (
    Layout((1, 2, 1, 1, 1)),
    Layout((1, 1, 2, 1, 1)),
    Layout((1, 1, 1, 2, 1)),
    Layout((1, 1, 1, 2, 1), gather=True),
    Layout((1, 1, 1, 1, 2)),
    Layout((1, 2, 1, 1, 1), dtype=torch.bfloat16),
    Layout((1, 1, 2, 1, 1), dtype=torch.bfloat16),
    Layout((1, 1, 1, 2, 1), dtype=torch.bfloat16),
    Layout((1, 1, 1, 1, 2), dtype=torch.bfloat16),
    Layout((1, 1, 1, 3, 1)),
    Layout((1, 1, 1, 1, 3)),
    Layout((1, 1, 1, 3, 1), dtype=torch.bfloat16),
    Layout((1, 1, 1, 1, 3), dtype=torch.bfloat16),
    Layout((1, 2, 1, 1, 2)),
    Layout((1, 1, 2, 1, 2)),
    Layout((1, 1, 2, 2, 1)),
    Layout((1, 1, 1, 2, 2)),
    Layout((1, 1, 1, 2, 2), gather=True),
    Layout((1, 1, 1, 1, 4)),
    Layout((1, 1, 4, 1, 1), dtype=torch.bfloat16),
    Layout((1, 1, 2, 1, 2), dtype=torch.bfloat16),
    Layout((1, 1, 1, 2, 2), dtype=torch.bfloat16),
)
"""Every axis alone and with others, over 2, 3 and 4 ranks, in both dtypes."""

MORE = (
    *(
        Layout(degrees)
        for degrees in (
            (1, 2, 2, 1, 1),
            (1, 2, 1, 2, 1),
            (1, 1, 4, 1, 1),
            (1, 1, 1, 4, 1),
            (1, 2, 4, 1, 1),
            (1, 2, 2, 2, 1),
            (1, 2, 2, 1, 2),
            (1, 2, 1, 4, 1),
            (1, 2, 1, 2, 2),
            (1, 2, 1, 1, 4),
            (1, 1, 4, 2, 1),
            (1, 1, 4, 1, 2),
            (1, 1, 2, 4, 1),
            (1, 1, 2, 2, 2),
            (1, 1, 2, 1, 4),
            (1, 1, 1, 8, 1),
            (1, 1, 1, 4, 2),
            (1, 1, 1, 2, 4),
            (1, 1, 1, 1, 8),
        )
    ),
    *(
        Layout(degrees, dtype=torch.bfloat16)
        for degrees in (
            (1, 2, 2, 1, 1),
            (1, 2, 1, 2, 1),
            (1, 2, 1, 1, 2),
            (1, 1, 2, 2, 1),
            (1, 1, 1, 4, 1),
            (1, 1, 1, 1, 4),
            (1, 2, 1, 2, 2),
            (1, 1, 4, 1, 2),
            (1, 1, 2, 2, 2),
            (1, 1, 1, 4, 2),
            (1, 1, 1, 2, 4),
        )
    ),
)
"""The other products over 4 ranks, and those over 8, which the slow suite adds."""


SIZES = [
    (2, False),
    pytest.param(3, False, marks=pytest.mark.slow),
    pytest.param(4, False, marks=pytest.mark.slow),
    pytest.param(4, True, marks=pytest.mark.slow),
    pytest.param(8, True, marks=pytest.mark.slow),
]
"""World sizes, and whether with the further products."""


def layouts(ranks: int, more: bool = False) -> list[Layout]:
    """Those of one world size."""
    return [layout for layout in (MORE if more else LAYOUTS) if world_size(layout.degrees) == ranks]


def cases(ranks: int, more: bool = False) -> list[tuple[str, Layout]]:
    """Every network under every layout of a world size that fits it."""
    return [(name, layout) for layout in layouts(ranks, more) for name in TINY if layout.fits(TINY[name].heads())]


@cache
def ranks_found(ranks: int, more: bool = False) -> list[dict[str, Tensor]]:
    """What every rank of a world made of its cases; asked once."""
    return on_ranks(ranks, forward, more)


def forward(rank: int, size: int, more: bool) -> dict[str, Tensor]:
    """The outputs, by name of the network and layout, and the bytes that were sent, by kind behind those."""
    found = {}
    for layout, networks in groupby(cases(size, more), key=lambda case: case[1]):
        groups = make_process_groups(RankPosition(rank, layout.degrees), torch.device("cpu"), timedelta(seconds=60))
        for name, _ in networks:
            tiny = TINY[name]
            network = tiny.build(math_attention, layout.dtype)
            shard_linears(network, tiny.plan, groups.tp)
            shard_tokens(network, tiny.plan, math_attention, math_lse, groups, layout.gather)
            latent, tau_B, condition = tiny.inputs
            groups.traffic.reset()
            output = network(latent.to(layout.dtype), tau_B, condition.to(layout.dtype)).float()
            found[f"{name} {layout}"] = branches(tiny.inputs, groups.cfg).combine(output)
            sent = groups.traffic.sent_bytes.items()
            found |= {f"{name} {layout} {kind}": torch.tensor(count) for kind, count in sent}
    return found


def branches(inputs: Inputs, cfg: Group) -> Branches:
    """Guidance of a batch by its own prompts, which changes nothing; on one rank, none."""
    rows = len(inputs[0])
    spec = ImageSpec(0, "", "", 0, 1, guidance=float(cfg.size), height=1, width=1)
    sample = Sample(spec, text=Conditioning(), negative=Conditioning())
    return Branches([replace(sample) for _ in range(rows)], ranks=cfg)
