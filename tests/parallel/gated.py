"""What each rank of a layout computes of a guided picture behind gates, evaluation by evaluation."""

from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor

from harness.caching.blocks import Rule
from harness.caching.policies import CachedNetwork, FirstBlock, TaylorSeer, TeaCache
from harness.parallel.attention import SequenceState
from harness.parallel.fsdp import shard_weights
from harness.parallel.mesh import Place
from harness.parallel.parallelize import cut_linears, deal_tokens
from harness.parallel.process_groups import Axes, connect, one_rank
from harness.pipeline.cache_state import History
from models.attention import math_attention
from models.attention.lse import math_lse
from tests.parallel.networks import TINY, Inputs, rows

NEVER = 1e9  # a threshold that no change reaches
KINDS = ("teacache", "first_block", "taylorseer")
DEGREES = ((1, 2, 1, 1, 1), (1, 1, 2, 1, 1), (1, 1, 1, 2, 1), (1, 1, 1, 1, 2))
NAMES = ("pixart", "flux", "z_image", "wan")
EVALUATIONS = 6
SHARDED = "dit first_block"  # dealt weights too, of a network that asks its first block for a part


def rule_of(kind: str, threshold: float) -> Rule:
    """A rule that computes every evaluation at 0."""
    if kind == "taylorseer":
        return TaylorSeer(2, False, 1, 3 if threshold else 1)
    return (TeaCache(1, False, 0, threshold, (1.0, 0.0))) if kind == "teacache" else FirstBlock(1, False, 0, threshold)


def evaluations(name: str, count: int) -> Iterator[Inputs]:
    """A latent and a time that move a little from one to the next; both rows are one picture's."""
    latent, tau_B, condition = TINY[name].inputs
    drift = torch.randn(latent.shape, generator=torch.Generator().manual_seed(9))
    for k in range(count):
        yield latent + 0.1 * k * drift, tau_B * 0.999**k, condition


def run(
    name: str, kind: str, threshold: float, axes: Axes, count: int = EVALUATIONS, shard: bool = False
) -> tuple[Tensor, History]:
    """(evaluations, 2, ...): the outputs of both rows, and which evaluations were computed."""
    tiny, state, owner = TINY[name], SequenceState(), History()
    network = tiny.build(math_attention)
    cut_linears(network, tiny.plan, axes.tp)
    cached = CachedNetwork(network, tiny.plan, rule_of(kind, threshold), axes.picture, state)
    if axes.tokens.size > 1:
        deal_tokens(network, tiny.plan, math_attention, math_lse, axes, state=state)
    if shard:
        shard_weights(network, tiny.plan, axes.weights, torch.device("cpu"))
    outputs = []
    for inputs in evaluations(name, count):
        mine = rows(inputs, [axes.cfg.index] if axes.cfg.size == 2 else [0, 1])
        output = cached(*mine, (owner,) * len(mine[0]))
        outputs.append(axes.cfg.all_gather(output).flatten(0, 1))
    return torch.stack(outputs), owner


def alone(name: str, kind: str) -> tuple[float, Tensor, History]:
    """A threshold half as far again as the second evaluation changes, and what one rank makes with it."""
    changed = run(name, kind, NEVER, one_rank(), 2)[1].change
    threshold = 1.5 * changed or 1.0
    return threshold, *run(name, kind, threshold, one_rank())


def on_rank(rank: int, size: int, thresholds: dict[str, float]) -> dict[str, Tensor]:
    """Outputs and computed evaluations, by network, rule and layout."""
    found = {}
    for degrees in DEGREES:
        axes = connect(Place(rank, degrees), torch.device("cpu"), timedelta(seconds=60))
        for case, threshold in thresholds.items():
            name, kind = case.split()
            output, owner = run(name, kind, threshold, axes, shard=case == SHARDED and axes.tokens.size > 1)
            found[f"{case} {degrees}"] = output
            found[f"{case} {degrees} computed"] = torch.tensor(owner.computed)
    return found
