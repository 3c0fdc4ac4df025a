"""Pauses between sets of ranks, deaths that requests explain, kills for memory, and a log that nothing fills."""

import errno
import logging
from pathlib import Path

import pytest

from harness.config.serve import ServeConfig
from harness.serving.transport import EngineGone
from harness.tasks.serve import restarts
from harness.tasks.serve.open_requests import OpenRequests
from harness.tasks.serve.restarts import Deaths, TroubleLog, oom_kills
from harness.tasks.serve.supervisor import name_memory
from tests.fixtures.serving.fake_engine import make_request
from tests.fixtures.serving.virtual_time import VirtualTime


def test_pauses_grow_to_a_minute_and_end_with_the_window() -> None:
    clock = VirtualTime()
    deaths, pauses = Deaths(ServeConfig(restarts=2, restart_window_s=600.0), clock.now), []
    for _ in range(12):
        deaths.add()
        pauses.append(deaths.pause_s)
        clock.time_s += 1
    assert pauses == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    clock.time_s += 601
    assert deaths.pause_s == 0


@pytest.mark.parametrize("from_outside", [False, True])
def test_a_death_that_a_request_explains_is_not_counted_unless_every_request_is_one(from_outside: bool) -> None:
    """One that ends its rank by SIGKILL is no suspect at first, and dies once more."""
    deaths, requests = Deaths(ServeConfig(restarts=2), VirtualTime().now), OpenRequests(ServeConfig())
    for number in range(20):
        deaths.on_image()
        job, explained = requests.add(make_request(f"{number}")), 0
        while not job.answered:
            requests.on_sent(job)
            deaths.add()
            explained = requests.on_engine_gone(EngineGone("rank 0 died", from_outside=from_outside))
        deaths.explain(explained)
        assert explained == (3 if from_outside else 2)
        assert deaths.pause_s == 0
    for _ in range(4):  # no image between them any more
        deaths.add()
        deaths.add()
        deaths.explain(2)
    assert deaths.pause_s > 0


def test_one_cause_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = VirtualTime()
    troubles = TroubleLog(clock.now)
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            troubles.add("receiving", OSError(errno.EMFILE, "Too many open files"))
            clock.time_s += 0.1
        troubles.add("receiving", OSError(errno.ENOSPC, "No space left on device"))
    assert [record.getMessage().partition("[")[0] for record in caplog.records] == ["receiving: OSError: "] * 3


def test_a_kill_for_memory_is_read_from_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 3\noom_kill 1\noom_group_kill 0\n")
    monkeypatch.setattr(restarts, "_memory_files", lambda: [events, tmp_path / "none"])
    before, killed = oom_kills(), EngineGone("rank 1 died with SIGKILL")
    assert before[0] == 1
    assert name_memory(killed, before) is killed
    events.write_text("low 0\noom 4\noom_kill 2\n")
    found = name_memory(killed, before)
    assert (found.kind, "memory ran out" in str(found)) == ("oom", True)
    unsupported = EngineGone("rank 0: no such operator", "unsupported")
    assert name_memory(unsupported, before) is unsupported
