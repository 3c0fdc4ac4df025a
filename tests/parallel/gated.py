"""What each rank of a layout computes of a guided picture behind gates, evaluation by evaluation."""

from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor

from harness.caching.blocks import SkipPolicy
from harness.caching.policies import CachedNetwork, FirstBlockCache, TaylorSeer, TeaCache
from harness.parallel.attention import SequenceState
from harness.parallel.fsdp import apply_fsdp
from harness.parallel.mesh import RankPosition
from harness.parallel.parallelize import shard_linears, shard_tokens
from harness.parallel.process_groups import ProcessGroups, make_process_groups, single_rank_groups
from harness.pipeline.cache_state import CacheState
from models.attention import math_attention
from models.attention.lse import math_lse
from tests.parallel.networks import TINY, Inputs, rows

NEVER = 1e9  # a threshold that no change reaches
KINDS = ("teacache", "first_block", "taylorseer")
DEGREES = ((1, 2, 1, 1, 1), (1, 1, 2, 1, 1), (1, 1, 1, 2, 1), (1, 1, 1, 1, 2))
NAMES = ("pixart", "flux", "z_image", "wan")
EVALUATIONS = 6
SHARDED = "dit first_block"  # dealt weights too, of a network that asks its first block for a part


def rule_of(kind: str, threshold: float) -> SkipPolicy:
    """A rule that computes every evaluation at 0."""
    if kind == "taylorseer":
        return TaylorSeer(2, False, 1, 3 if threshold else 1)
    return (
        (TeaCache(1, False, 0, threshold, (1.0, 0.0)))
        if kind == "teacache"
        else FirstBlockCache(1, False, 0, threshold)
    )


def evaluations(name: str, count: int) -> Iterator[Inputs]:
    """A latent and a time that move a little from one to the next; both rows are one picture's."""
    latent, tau_B, condition = TINY[name].inputs
    drift = torch.randn(latent.shape, generator=torch.Generator().manual_seed(9))
    for k in range(count):
        yield latent + 0.1 * k * drift, tau_B * 0.999**k, condition


def run(
    name: str, kind: str, threshold: float, groups: ProcessGroups, count: int = EVALUATIONS, shard: bool = False
) -> tuple[Tensor, CacheState]:
    """(evaluations, 2, ...): the outputs of both rows, and which evaluations were computed."""
    tiny, state, owner = TINY[name], SequenceState(), CacheState()
    network = tiny.build(math_attention)
    shard_linears(network, tiny.plan, groups.tp)
    cached = CachedNetwork(network, tiny.plan, rule_of(kind, threshold), groups.replica, state)
    if groups.tokens.size > 1:
        shard_tokens(network, tiny.plan, math_attention, math_lse, groups, state=state)
    if shard:
        apply_fsdp(network, tiny.plan, groups.weights, torch.device("cpu"))
    outputs = []
    for inputs in evaluations(name, count):
        mine = rows(inputs, [groups.cfg.index] if groups.cfg.size == 2 else [0, 1])
        output = cached(*mine, (owner,) * len(mine[0]))
        outputs.append(groups.cfg.all_gather(output).flatten(0, 1))
    return torch.stack(outputs), owner


def alone(name: str, kind: str) -> tuple[float, Tensor, CacheState]:
    """A threshold half as far again as the second evaluation changes, and what one rank makes with it."""
    changed = run(name, kind, NEVER, single_rank_groups(), 2)[1].accumulated_change
    threshold = 1.5 * changed or 1.0
    return threshold, *run(name, kind, threshold, single_rank_groups())


def on_rank(rank: int, size: int, thresholds: dict[str, float]) -> dict[str, Tensor]:
    """Outputs and computed evaluations, by network, rule and layout."""
    found = {}
    for degrees in DEGREES:
        groups = make_process_groups(RankPosition(rank, degrees), torch.device("cpu"), timedelta(seconds=60))
        for case, threshold in thresholds.items():
            name, kind = case.split()
            output, owner = run(name, kind, threshold, groups, shard=case == SHARDED and groups.tokens.size > 1)
            found[f"{case} {degrees}"] = output
            found[f"{case} {degrees} computed"] = torch.tensor(owner.computed)
    return found
