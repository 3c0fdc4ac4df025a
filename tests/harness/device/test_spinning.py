"""Spinning that depends on whether other processes use the processors, by the kernel's counts of waiting threads."""

import subprocess
import sys

import pytest

from harness.device.spinning import (
    CROWDED,
    FREE_SAMPLES,
    AdaptiveWaits,
    BriefWaits,
    adaptive_waits,
    largest_wait,
    openmp_library,
)
from harness.device.usage import times_by_thread
from tests.fixtures.commands import environment, wait_for

THROUGH_BARRIERS = """
import subprocess, sys, time
import torch
from harness.device.spinning import adaptive_waits

torch.set_num_threads(2)
waits = adaptive_waits(2)
assert waits is not None

def until(brief):
    end = time.monotonic() + 60
    while waits.is_brief != brief:
        assert time.monotonic() < end, f"the waits are not {'brief' if brief else 'long'}"
        for _ in range(100):
            torch.softmax(x, -1)

x = torch.randn(64, 4096)
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
try:
    until(True)
finally:
    for other in others:
        other.kill()
        other.wait()
assert waits.changes == 1
print("brief")
waits.close()
assert not waits.is_brief
"""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> AdaptiveWaits:
    library = openmp_library()
    if library is None:
        pytest.skip("PyTorch has another OpenMP here")
    return AdaptiveWaits(library, 2)


def test_two_crowded_samples_make_the_waits_brief_and_a_free_second_ends_that(waits: AdaptiveWaits) -> None:
    for waited in [CROWDED + 0.5, 0.0, CROWDED + 0.5]:
        waits.observe(waited)
        assert not waits.is_brief
    waits.observe(CROWDED + 0.1)
    for k in range(FREE_SAMPLES - 2):
        waits.observe(0.0 if k % 2 else 0.3)
        assert waits.is_brief, "a mean over all samples decides"
    for _ in range(FREE_SAMPLES):
        waits.observe(0.0)
    assert not waits.is_brief
    assert waits.changes == 1


def test_brief_waits_hold_more_threads_than_processors_until_they_are_closed(waits: AdaptiveWaits) -> None:
    library = openmp_library()
    assert library is not None
    before = set(times_by_thread("self") or {})
    brief = BriefWaits(library, 2)
    try:
        wait_for(lambda: len(set(times_by_thread("self") or {}) - before) >= 2, "the holder and a thread of its team")
    finally:
        brief.close()


def test_the_largest_share_counts_threads_that_wanted_to_run() -> None:
    before = {"1": (1.0, 1.0), "2": (1.0, 1.0), "3": (1.0, 1.0)}
    now = {"1": (1.06, 1.02), "2": (1.04, 1.04), "3": (1.0, 1.01), "4": (9.0, 9.0)}
    assert largest_wait(before, now, 0.1) == pytest.approx(0.5)
    assert largest_wait(before, before, 0.1) == 0


def test_a_single_thread_waits_for_nobody() -> None:
    assert adaptive_waits(1) is None


def test_busy_processes_make_the_waits_brief() -> None:
    if openmp_library() is None or times_by_thread("self") is None:
        pytest.skip("PyTorch has another OpenMP here, or the kernel does not count")
    done = subprocess.run(
        [sys.executable, "-c", THROUGH_BARRIERS], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "brief\n", done.stderr
