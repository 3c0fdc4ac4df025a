"""What an approximate layout keeps of one evaluation of a network for the next: keys and values, which are stale there.

Neighbouring evaluations of a picture see nearly the same state, so that attention may meet some of the keys and values
as they were one evaluation ago. The first evaluations of a picture are exact, and fill what is kept.
"""

from __future__ import annotations

from torch import nn


class StaleKVCache:
    """Counts the evaluations of a micro-batch, and lets go behind it what was kept between them.

    Args:
        warmup: evaluations of a micro-batch that are exact, at least 1.
    """

    method = ""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.evaluations = 0
        self.cached_bytes = 0

    def count_evaluations_of(self, network: nn.Module) -> None:
        """Counts the calls of a network."""
        network.register_forward_pre_hook(self._count)

    def _count(self, network: nn.Module, args: tuple[object, ...]) -> None:
        self.evaluations += 1

    @property
    def is_exact(self) -> bool:
        """Whether the evaluation that runs now is."""
        return self.evaluations <= self.warmup

    def begin(self) -> None:
        """A micro-batch begins: nothing is known of it, whatever became of the one before."""
        self._release()
        self.evaluations = self.cached_bytes = 0

    def end(self) -> str:
        """It has ended; what is to be said of it."""
        self._release()
        exact = min(self.warmup, self.evaluations)
        cached_mib = self.cached_bytes / 2**20
        return (
            f"{self.method}: {exact} of {self.evaluations} evaluations exact; a rank kept {cached_mib:.2f} MiB of keys "
            "and values between them"
        )

    def _release(self) -> None:
        """Waits for what is on its way, and lets go of what is kept."""
