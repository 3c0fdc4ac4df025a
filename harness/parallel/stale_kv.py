"""Keys and values that an approximate layout stores from one evaluation to the next, where they are stale.

Neighbouring evaluations of an image see nearly the same state. So attention may use some of the keys and values of the
evaluation before. The first evaluations of an image are exact, and fill the cache.
"""

from __future__ import annotations

from torch import nn


class StaleKVCache:
    """Counts the evaluations of a micro-batch, and releases the stored keys and values after it.

    Args:
        warmup: the exact evaluations at the start of a micro-batch, at least 1.

    Attributes:
        method: the name of the method in the note for the record.
        evaluations: the evaluations of the micro-batch so far.
        cached_bytes: the bytes of keys and values that this rank stores between them.
    """

    method = ""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.evaluations = 0
        self.cached_bytes = 0

    def count_evaluations_of(self, network: nn.Module) -> None:
        """Count the forwards of a network as evaluations."""
        network.register_forward_pre_hook(self._count)

    def _count(self, network: nn.Module, args: tuple[object, ...]) -> None:
        self.evaluations += 1

    @property
    def is_exact(self) -> bool:
        """Whether the current evaluation is exact."""
        return self.evaluations <= self.warmup

    def begin(self) -> None:
        """Start a micro-batch with an empty cache, however the one before ended."""
        self._release()
        self.evaluations = self.cached_bytes = 0

    def end(self) -> str:
        """End a micro-batch.

        Returns:
            A note for the record.
        """
        self._release()
        exact = min(self.warmup, self.evaluations)
        cached_mib = self.cached_bytes / 2**20
        return (
            f"{self.method}: {exact} of {self.evaluations} evaluations exact; a rank stored {cached_mib:.2f} MiB of "
            "keys and values between them"
        )

    def _release(self) -> None:
        """Wait for pending transfers, and release what is stored."""
