"""Finding ranks that live and do nothing more."""

from __future__ import annotations

import time

from harness.serving.transport import EngineGone


class HangDetector:
    """How long rank 0 has reported nothing about the requests that it has.

    Args:
        patience_s: The longest silence, seconds.
    """

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self._last_message_at = time.monotonic()

    def on_message(self) -> None:
        """Record that rank 0 has reported something, or was idle until now."""
        self._last_message_at = time.monotonic()

    def check(self, grace_s: float) -> None:
        """Raise EngineGone if rank 0 has been silent for too long.

        Args:
            grace_s: The time beyond the patience that the engine has to report a missed deadline itself, seconds.

        Raises:
            EngineGone: Rank 0 was silent for too long.
        """
        if time.monotonic() - self._last_message_at > self.patience_s + grace_s:
            raise EngineGone(
                f"rank 0 reported nothing about its requests for {self.patience_s:g} s: a rank has stopped, or is "
                "slower than launch.collective_timeout_s allows"
            )
