"""Caches of the denoiser: policies that skip an evaluation, or its negative branch.

harness.caching.blocks skips the blocks; the three policies differ in the signal that they look at:

    TeaCache           how far the first block's modulated input has moved, added up from evaluation to evaluation
    FirstBlockCache    how far what the first block adds differs from what it added in the last computed evaluation
    TaylorSeer         none: one evaluation of N is computed, and the others are forecast from differences of those
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from harness.caching.blocks import BlockCache, CachedForward, SkipPolicy, SkipSignal
from harness.config.cache import CACHES, CacheConfig, is_block_cache, is_guidance_cache
from harness.parallel.attention import SequenceState
from harness.parallel.group import Group
from harness.pipeline.cache_state import CacheState
from harness.pipeline.guidance import GuidanceInterval, GuidanceReuse, GuidanceSchedule, always_guided
from harness.plugins.options import own_options
from models.blocks import Runner
from models.components import Conditioning
from models.plan import ParallelPlan, Stack
from schedulers.registry import imported


@dataclass(frozen=True)
class ForcedEvaluations:
    """What the policies share: evaluations that are computed whatever the signal is.

    Args:
        warmup: the number of first evaluations that are computed.
        final: whether the evaluations of the last solver step are computed.
        order: the order of the forecast.
    """

    warmup: int
    final: bool
    order: int

    def must_compute(self, state: CacheState) -> bool:
        """Return whether the next evaluation is one of them."""
        return len(state.computed) < self.warmup or (self.final and state.is_last_step)


@dataclass(frozen=True)
class TeaCache(ForcedEvaluations):
    """Computes an evaluation once the rescaled changes since the last computed one add up to a threshold.

    Source: TeaCache (Liu et al. 2024, arXiv:2411.19108), in the convention of its TeaCache4FLUX: what the blocks
    added is added again.

    Args:
        threshold: the sum at which an evaluation is computed; 0 computes every evaluation.
        coefficients: the polynomial over mean |new - old| / mean |old|, the highest power first.
    """

    threshold: float
    coefficients: tuple[float, ...]
    signal = SkipSignal.stack
    compares_latest = True

    def accumulate(self, state: CacheState, change: float) -> float:
        """Add the rescaled change to the sum."""
        rescaled = 0.0
        for coefficient in self.coefficients:
            rescaled = rescaled * change + coefficient
        return state.accumulated_change + rescaled

    def should_skip(self, state: CacheState, accumulated_change: float) -> bool:
        """Skip while the sum is below the threshold."""
        # a published polynomial is negative near 0, and sums of it may be
        return not self.must_compute(state) and self.threshold > 0 and accumulated_change < self.threshold


@dataclass(frozen=True)
class FirstBlockCache(ForcedEvaluations):
    """Computes an evaluation if what the first block adds has changed by a threshold since the last computed one.

    Source: ParaAttention's first-block cache, in the convention of diffusers' `FirstBlockCacheConfig`.

    Args:
        threshold: the change mean |new - old| / mean |old| at which an evaluation is computed; 0 computes every one.
    """

    threshold: float
    signal = SkipSignal.first_block
    compares_latest = False

    def accumulate(self, state: CacheState, change: float) -> float:
        """Return the change alone: it is already since the last computed evaluation."""
        return change

    def should_skip(self, state: CacheState, accumulated_change: float) -> bool:
        """Skip if the change is below the threshold."""
        return not self.must_compute(state) and accumulated_change < self.threshold


@dataclass(frozen=True)
class TaylorSeer(ForcedEvaluations):
    """Computes one evaluation of `interval` after the warm-up, and forecasts the others.

    Source: TaylorSeer (Liu et al. 2025, arXiv:2503.06923). Here the sum of what all blocks of a stack add is
    forecast; the paper forecasts the parts of each block.

    Args:
        interval: evaluations from one computed evaluation to the next.
    """

    interval: int
    signal = SkipSignal.none
    compares_latest = False

    def accumulate(self, state: CacheState, change: float) -> float:
        """Return 0: there is no signal."""
        return 0.0

    def should_skip(self, state: CacheState, accumulated_change: float) -> bool:
        """Skip until the interval is over."""
        return not self.must_compute(state) and state.steps_since_computed < self.interval


def _forced(cache: CacheConfig) -> tuple[int, bool, int]:
    return cache.warmup or 1, bool(cache.final), cache.order or 0


def teacache(cache: CacheConfig) -> TeaCache:
    """Return the policy of cache=teacache."""
    return TeaCache(*_forced(cache), cache.threshold or 0.0, tuple(cache.coefficients or ()))


def first_block(cache: CacheConfig) -> FirstBlockCache:
    """Return the policy of cache=first_block."""
    return FirstBlockCache(*_forced(cache), cache.threshold or 0.0)


def taylorseer(cache: CacheConfig) -> TaylorSeer:
    """Return the policy of cache=taylorseer."""
    return TaylorSeer(*_forced(cache), cache.interval or 1)


def guidance_interval(cache: CacheConfig) -> GuidanceInterval:
    """Return the schedule of cache=guidance_interval."""
    return GuidanceInterval(cache.sigma_low or 0.0, math.inf if cache.sigma_high is None else cache.sigma_high)


def guidance_skip(cache: CacheConfig) -> GuidanceReuse:
    """Return the schedule of cache=guidance_skip."""
    return GuidanceReuse(cache.warmup or 1, cache.interval or 1)


class CachedNetwork(nn.Module):
    """A network whose evaluations may be skipped.

    Args:
        network: the network, written for one device; the runners of its blocks get the cache from `wrap`.
        plan: the network's stacks of blocks.
        policy: decides when the evaluation of an image is computed.
        replica: the ranks that compute an image together.
        sequence: how tokens are sharded over them.
    """

    def __init__(
        self, network: nn.Module, plan: ParallelPlan, policy: SkipPolicy, replica: Group, sequence: SequenceState
    ) -> None:
        super().__init__()
        self.network = network
        self._block_cache = BlockCache(plan)
        self._policy, self._replica, self._sequence = policy, replica, sequence

    def wrap(self, stack: Stack, inner: Runner) -> Runner:
        """Return a runner that can skip the blocks of a stack (models.blocks.RunnerFeature)."""
        return self._block_cache.wrap(stack, inner)

    def forward(
        self, latent: Tensor, tau_B: Tensor, condition: Conditioning, cache_states: Sequence[CacheState]
    ) -> Tensor:
        """Evaluate the network (models.components.Denoiser).

        Args:
            latent: the network's input, (B, ...).
            tau_B: the time of each row, (B,).
            condition: the conditioning, B rows.
            cache_states: the cache state of each row's image.

        Returns:
            The network's output, (B, ...).
        """
        with self._block_cache.activate(CachedForward(cache_states, self._policy, self._replica, self._sequence)):
            output: Tensor = self.network(latent, tau_B, condition)
        return output


def cached_network(
    cache: CacheConfig,
    network: nn.Module,
    plan: ParallelPlan,
    replica: Group,
    sequence: SequenceState,
    plugin: Mapping[str, object] | None = None,
) -> CachedNetwork | None:
    """Return the network with the configured block cache, which the runners of its blocks still have to get.

    Args:
        cache: the checked configuration.
        network: the network, written for one device.
        plan: the network's stacks of blocks.
        replica: the ranks that compute an image together.
        sequence: how tokens are sharded over them.
        plugin: the options of plug-ins.

    Returns:
        The network with its cache; None if the configuration has no block cache.
    """
    if not is_block_cache(cache.name):
        return None
    make: Callable[..., SkipPolicy] = imported(CACHES[cache.name].make)
    policy = make(cache, **own_options(CACHES, cache.name, plugin or {}))
    return CachedNetwork(network, plan, policy, replica, sequence)


def guidance_schedule(cache: CacheConfig, plugin: Mapping[str, object] | None = None) -> GuidanceSchedule:
    """Return which evaluations compute both guidance branches.

    Args:
        cache: the checked configuration.
        plugin: the options of plug-ins.

    Returns:
        The schedule.
    """
    if not is_guidance_cache(cache.name):
        return always_guided
    make: Callable[..., GuidanceSchedule] = imported(CACHES[cache.name].make)
    return make(cache, **own_options(CACHES, cache.name, plugin or {}))
