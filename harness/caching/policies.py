"""Caches of the denoiser: the rules by which an evaluation, or its negative branch, is not computed.

Blocks are passed by as harness.caching.blocks does it; the three rules differ in what they look at:

    TeaCache      how far the first block's modulated input has moved, added up from evaluation to evaluation
    first block   how far what the first block adds is from what it added when all were last computed
    TaylorSeer    nothing: one evaluation of N is computed, the others forecast from differences of those
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from harness.caching.blocks import Gates, Look, Passage, Rule
from harness.config.cache import BLOCK_CACHES, CacheConfig
from harness.parallel.attention import SequenceState
from harness.parallel.group import Group
from harness.pipeline.cache_state import History
from harness.pipeline.guidance import Interval, Reuse, When, always
from models.components import Conditioning
from models.plan import ParallelPlan


@dataclass(frozen=True)
class Always:
    """What the rules share: evaluations that are computed whatever they are shown.

    Args:
        warmup: so many from the first on.
        final: those of the last solver step.
        order: of the forecast.
    """

    warmup: int
    final: bool
    order: int

    def bound(self, history: History) -> bool:
        """Whether the evaluation that comes is one of them."""
        return len(history.computed) < self.warmup or (self.final and history.final)


@dataclass(frozen=True)
class TeaCache(Always):
    """Computed once the rescaled changes since the last computed evaluation add up to a threshold.

    Args:
        threshold: 0 computes every evaluation.
        coefficients: of the polynomial over mean |new - old| / mean |old|, the highest power first.

    Source: TeaCache (Liu et al. 2024, arXiv:2411.19108), in the convention of its TeaCache4FLUX: what the blocks
    added is added again.
    """

    threshold: float
    coefficients: tuple[float, ...]
    look = Look.signal
    from_last = True

    def total(self, history: History, change: float) -> float:
        rescaled = 0.0
        for coefficient in self.coefficients:
            rescaled = rescaled * change + coefficient
        return history.change + rescaled

    def skips(self, history: History, total: float) -> bool:
        # a published polynomial is negative near 0, and sums of it may be
        return not self.bound(history) and self.threshold > 0 and total < self.threshold


@dataclass(frozen=True)
class FirstBlock(Always):
    """Computed where what the first block adds has changed by a threshold since the last computed evaluation.

    Args:
        threshold: of mean |new - old| / mean |old|; 0 computes every evaluation.

    Source: ParaAttention's first-block cache, in the convention of diffusers' `FirstBlockCacheConfig`.
    """

    threshold: float
    look = Look.first_block
    from_last = False

    def total(self, history: History, change: float) -> float:
        return change

    def skips(self, history: History, total: float) -> bool:
        return not self.bound(history) and total < self.threshold


@dataclass(frozen=True)
class TaylorSeer(Always):
    """One evaluation of `interval` is computed, after those of the warm-up.

    Source: TaylorSeer (Liu et al. 2025, arXiv:2503.06923); what all blocks of a stack add together is
    forecast, where the paper forecasts each block's parts.
    """

    interval: int
    look = Look.nothing
    from_last = False

    def total(self, history: History, change: float) -> float:
        return 0.0

    def skips(self, history: History, total: float) -> bool:
        return not self.bound(history) and history.behind < self.interval


def block_rule(cache: CacheConfig) -> Rule:
    """The rule of a cache of blocks, of a checked configuration."""
    always = (cache.warmup or 1, bool(cache.final), cache.order or 0)
    if cache.name == "taylorseer":
        return TaylorSeer(*always, cache.interval or 1)
    if cache.name == "first_block":
        return FirstBlock(*always, cache.threshold or 0.0)
    return TeaCache(*always, cache.threshold or 0.0, tuple(cache.coefficients or ()))


class CachedNetwork(nn.Module):
    """A network whose evaluations may be passed by.

    Args:
        network: written for one device; its blocks are put behind gates in place.
        plan: of its folder.
        rule: when a picture's evaluation is computed.
        picture: the ranks that compute a picture together.
        state: how tokens are dealt over them.
    """

    def __init__(
        self, network: nn.Module, plan: ParallelPlan, rule: Rule, picture: Group, state: SequenceState
    ) -> None:
        super().__init__()
        self.network = network
        self._gates = Gates(network, plan)
        self._rule, self._picture, self._state = rule, picture, state

    def forward(self, latent: Tensor, tau_B: Tensor, condition: Conditioning, owners: Sequence[History]) -> Tensor:
        """One evaluation (models.components.Denoiser), of rows that belong to these pictures."""
        with self._gates.open_for(Passage(owners, self._rule, self._picture, self._state)):
            output: Tensor = self.network(latent, tau_B, condition)
        return output


def cached_network(
    cache: CacheConfig, network: nn.Module, plan: ParallelPlan, picture: Group, state: SequenceState
) -> CachedNetwork | None:
    """The network behind a cache of blocks, in place; None where the configuration has no such cache."""
    return CachedNetwork(network, plan, block_rule(cache), picture, state) if cache.name in BLOCK_CACHES else None


def guidance_when(cache: CacheConfig) -> When:
    """Which evaluations are of both branches."""
    if cache.name == "guidance_interval":
        return Interval(cache.sigma_low or 0.0, math.inf if cache.sigma_high is None else cache.sigma_high)
    if cache.name == "guidance_skip":
        return Reuse(cache.warmup or 1, cache.interval or 1)
    return always
