"""engine=cache_dit: the blocks of a peer's network behind cache-dit's DBCache.

The first blocks of every evaluation are computed; where their residual changed little since an evaluation that was
computed whole (relative L1), the others are not, and add what they added then (github.com/vipshop/cache-dit, DBCache).
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from types import ModuleType

from harness.baselines.model import BaselineModel
from harness.config.schema import BlockCacheConfig

MAX_CONSECUTIVE = 3  # evaluations cut short one after another, as SGLang has it


@dataclass(frozen=True)
class DBCacheSkips:
    """Which evaluations of a micro-batch were cut short, counted from 0.

    Args:
        whole: in every forward of theirs.
        half: in one forward of a guided pair.
        blocks: computed all the same, and all.
    """

    skipped: list[int]
    half_skipped: list[int]
    blocks: tuple[int, int]

    def note(self, evaluations: int) -> str:
        """For the record, of so many evaluations in all."""
        if not self.skipped and not self.half_skipped:
            return (
                f"cache-dit skipped nothing in {evaluations} evaluations; lower engine.cache.warmup, or raise "
                "engine.cache.threshold"
            )
        computed, depth = self.blocks
        halves = f", and in one half of {_listed(self.half_skipped)}" if self.half_skipped else ""
        return (
            f"cache-dit computed {computed} of {depth} blocks in {len(self.skipped)} of {evaluations} evaluations, "
            f"which nfe does not count: {_listed(self.skipped)}{halves}"
        )


class DBCache:
    """cache-dit around a network, begun anew for every micro-batch.

    Args:
        model: whose network is changed in place.
        config: when evaluations are cut short.

    Raises:
        ValueError: more blocks in every evaluation than there are to skip.
    """

    def __init__(self, model: BaselineModel, config: BlockCacheConfig) -> None:
        self._library = quiet_library()
        self._network = model.network
        self._config = config
        self._pairs = False
        adapter = self._library.get_adapter(model.pipeline)
        # in the pipeline's own place it would wrap __call__ of its class, and so every pipeline of the process
        blocks = importlib.import_module("cache_dit.caching.block_adapters")
        adapter.pipe = blocks.FakeDiffusionPipeline(model.network)
        self._library.enable_cache(adapter, cache_config=self._settings(pairs=False))
        self._depth = sum(len(part) for part in adapter.blocks[0])
        if config.first_blocks >= self._depth:
            raise ValueError(
                f"engine.cache.first_blocks={config.first_blocks} leaves nothing to skip in a network of {self._depth} "
                f"blocks; give at most {self._depth - 1}"
            )

    def begin(self, pairs: bool) -> None:
        """Forgets the last micro-batch; `pairs` says that evaluations take two forwards, prompt and negative."""
        self._pairs = pairs
        self._library.refresh_context(self._network, cache_config=self._settings(pairs))

    def skips(self) -> DBCacheSkips:
        """What was skipped since it began."""
        stats, pairs = self._library.summary(self._network, logging=False)[-1], self._pairs
        first = set(stats.cached_steps)
        second = set(stats.cfg_cached_steps) if pairs else first
        return DBCacheSkips(sorted(first & second), sorted(first ^ second), (self._config.first_blocks, self._depth))

    def _settings(self, pairs: bool) -> object:
        return self._library.DBCacheConfig(
            Fn_compute_blocks=self._config.first_blocks,
            Bn_compute_blocks=0,
            max_warmup_steps=self._config.warmup,
            max_continuous_cached_steps=MAX_CONSECUTIVE,
            residual_diff_threshold=self._config.threshold,
            enable_separate_cfg=pairs,
        )


def quiet_library() -> ModuleType:
    """cache-dit, which otherwise tells a rank's log what it recognises."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "warning")
    return importlib.import_module("cache_dit")


def _listed(evaluations: list[int]) -> str:
    return ", ".join(map(str, evaluations)) or "none"
