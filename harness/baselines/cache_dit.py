"""engine=cache_dit: the blocks of a baseline's network with cache-dit's DBCache.

The first blocks of every evaluation are computed. If their residual has changed little (relative L1) since the last
full evaluation, the other blocks are skipped and their cached residual is added (github.com/vipshop/cache-dit,
DBCache).
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from types import ModuleType

from harness.baselines.model import BaselineModel
from harness.config.schema import BlockCacheConfig

MAX_CONSECUTIVE = 3  # the largest number of consecutive shortened evaluations, SGLang's default


@dataclass(frozen=True)
class DBCacheSkips:
    """The evaluations of a micro-batch that skipped blocks, counted from 0.

    Args:
        skipped: the evaluations that skipped blocks in all of their forwards.
        half_skipped: the evaluations that skipped blocks in one forward of a guided pair.
        blocks: the blocks that are always computed, and all blocks.
    """

    skipped: list[int]
    half_skipped: list[int]
    blocks: tuple[int, int]

    def note(self, evaluations: int) -> str:
        """Return the note for the record, given the number of all evaluations."""
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
    """cache-dit around a network, reset for every micro-batch.

    Args:
        model: the pipeline, whose network is changed in place.
        config: the thresholds that decide which evaluations skip blocks.

    Raises:
        ValueError: so many blocks in every evaluation that none is left to skip.
    """

    def __init__(self, model: BaselineModel, config: BlockCacheConfig) -> None:
        self._library = quiet_library()
        self._network = model.network
        self._config = config
        self._separate_guidance = False
        adapter = self._library.get_adapter(model.pipeline)
        # with the pipeline itself it would wrap __call__ of the class, and so every pipeline of the process
        blocks = importlib.import_module("cache_dit.caching.block_adapters")
        adapter.pipe = blocks.FakeDiffusionPipeline(model.network)
        self._library.enable_cache(adapter, cache_config=self._settings(separate_guidance=False))
        self._depth = sum(len(part) for part in adapter.blocks[0])
        if config.first_blocks >= self._depth:
            raise ValueError(
                f"engine.cache.first_blocks={config.first_blocks} leaves nothing to skip in a network of {self._depth} "
                f"blocks; give at most {self._depth - 1}"
            )

    def begin(self, separate_guidance: bool) -> None:
        """Forget the last micro-batch.

        Args:
            separate_guidance: whether an evaluation takes two forwards, for prompt and negative prompt.
        """
        self._separate_guidance = separate_guidance
        self._library.refresh_context(self._network, cache_config=self._settings(separate_guidance))

    def skips(self) -> DBCacheSkips:
        """Return what was skipped since `begin`."""
        stats = self._library.summary(self._network, logging=False)[-1]
        first = set(stats.cached_steps)
        second = set(stats.cfg_cached_steps) if self._separate_guidance else first
        return DBCacheSkips(sorted(first & second), sorted(first ^ second), (self._config.first_blocks, self._depth))

    def _settings(self, separate_guidance: bool) -> object:
        return self._library.DBCacheConfig(
            Fn_compute_blocks=self._config.first_blocks,
            Bn_compute_blocks=0,
            max_warmup_steps=self._config.warmup,
            max_continuous_cached_steps=MAX_CONSECUTIVE,
            residual_diff_threshold=self._config.threshold,
            enable_separate_cfg=separate_guidance,
        )


def quiet_library() -> ModuleType:
    """Return cache-dit, set not to log its detections to the rank's log."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "warning")
    return importlib.import_module("cache_dit")


def _listed(evaluations: list[int]) -> str:
    return ", ".join(map(str, evaluations)) or "none"
