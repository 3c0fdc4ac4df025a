"""What the clients of both transports share: the bar of a phase, the rate after a warm-up, the ranks' processors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from rich.progress import Progress

from harness.client.build_record import waiting_notes
from harness.config.schema import RunConfig
from harness.device.usage import ProcessUsage, waited_share
from harness.metrics.load import OK
from harness.tasks.load.tracker import RequestTracker

GRACE_S = 30.0  # the time beyond a request's own deadline after which a request without an answer is lost


class RanksWatch:
    """The use of processors by ranks during a load.

    Args:
        pids: Ids of their processes.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._before = {pid: used for pid in pids if (used := ProcessUsage.of(pid)) is not None}

    def notes(self) -> list[str]:
        """Return a note that says so if they had to wait for processors; none if one of them has ended."""
        after = {pid: ProcessUsage.of(pid) for pid in self._before}
        used = [later.since(self._before[pid]) for pid, later in after.items() if later is not None]
        return (
            waiting_notes(waited_share([(part.cpu_s, part.waited_s) for part in used])) if all(after.values()) else []
        )


def with_rate(config: RunConfig, warm: RequestTracker) -> RunConfig:
    """Return the configuration with the rate that load.rate_share means; the same one without that key.

    Args:
        config: The resolved configuration of the load.
        warm: The requests of the warm-up.

    Raises:
        ValueError: No request of the warm-up succeeded.
    """
    share = config.load.rate_share
    if share is None:
        return config
    ended = [row.ended_s for row in warm.rows if row.outcome == OK and row.ended_s is not None]
    if not ended:
        raise ValueError("no request of the warm-up succeeded, so there is no rate; raise load.warmup_s")
    rate = share * len(ended) / max(*ended, config.load.warmup_s)
    return replace(config, load=replace(config.load, rate=rate))


@contextmanager
def phase_bar(bars: Progress, label: str) -> Iterator[Callable[[RequestTracker], None]]:
    """Show a progress bar of sent and answered requests inside a `with` block.

    Args:
        bars: The progress bars.
        label: The text beside the bar.

    Yields:
        A function that updates the bar from a tracker.
    """
    task = bars.add_task(label, total=None)

    def update(tracker: RequestTracker) -> None:
        sent, waiting = len(tracker.rows), len(tracker.outstanding)
        bars.update(task, completed=sent - waiting, total=sent)

    yield update
    bars.remove_task(task)
