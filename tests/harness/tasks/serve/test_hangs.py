"""Hangs are found from the times of earlier steps, in virtual time."""

import os
import signal
import subprocess
import sys

import pytest

from harness.config.optimize import Optimize
from harness.config.schema import RunConfig
from harness.messages import QUEUED, Failure, GenerationRequest, GenerationResult, Progress
from harness.serving.transport import EngineGone
from harness.tasks.serve.hangs import (
    FACTOR,
    FLOOR_S,
    STOPPED_S,
    HangDetector,
    OwnTime,
    StoppedRanks,
    first_step_s,
    is_stopped,
    remembered_share,
)
from tests.fixtures.commands import wait_for
from tests.fixtures.serving.virtual_time import VirtualTime

HANG_S, COLLECTIVE_S = 30.0, 600.0


def request(name: str, side: int = 64, steps: int = 10, images: int = 1) -> GenerationRequest:
    return GenerationRequest(name, ["x"], steps, 1.0, side, side, samples_per_prompt=images, batch_size=images)


def detector(clock: VirtualTime) -> HangDetector:
    return HangDetector(HANG_S, COLLECTIVE_S, clock.now)


def run(hangs: HangDetector, clock: VirtualTime, sent: GenerationRequest, step_s: float, answer: bool = True) -> None:
    """Let a request run with steps of a certain duration."""
    hangs.on_sent(sent)
    hangs.on_message(Progress(sent.request_id, "text_encoding", 0, 0))
    for step in range(sent.steps):
        clock.time_s += step_s
        hangs.check()
        hangs.on_message(Progress(sent.request_id, "denoising", step + 1, sent.steps))
    if answer:
        clock.time_s += step_s
        hangs.on_message(GenerationResult(sent.request_id, [], [], 1.0))


def silence(hangs: HangDetector, clock: VirtualTime) -> float:
    """Return the seconds of silence after which the ranks hang, to a tenth."""
    began = clock.time_s
    while clock.time_s - began < 2 * COLLECTIVE_S:
        clock.time_s += 0.1
        try:
            hangs.check()
        except EngineGone:
            return clock.time_s - began
    return float("inf")


@pytest.mark.parametrize(("step_s", "expected_s"), [(1.0, FACTOR), (0.01, FLOOR_S), (100.0, COLLECTIVE_S)])
def test_a_step_may_take_a_multiple_of_the_slowest_of_its_kind(step_s: float, expected_s: float) -> None:
    clock = VirtualTime()
    hangs = detector(clock)
    hangs.hang_s = 200.0
    run(hangs, clock, request("a"), step_s)
    run(hangs, clock, request("b"), step_s, answer=False)
    assert silence(hangs, clock) == pytest.approx(expected_s, abs=0.2)


def test_a_stall_of_the_machine_is_forgotten() -> None:
    clock = VirtualTime()
    hangs = detector(clock)
    run(hangs, clock, request("stalls", steps=1), 20.0)
    run(hangs, clock, request("goes on", steps=1000), 0.1)
    run(hangs, clock, request("hangs"), 0.1, answer=False)
    assert silence(hangs, clock) == pytest.approx(FLOOR_S, abs=0.2)
    config = RunConfig()
    config.engine.optimize = Optimize.none
    assert remembered_share(config) < 1
    config.model.text.keep_loaded = False
    assert remembered_share(config) == 1


def test_a_kind_that_was_never_seen_has_the_configured_time_or_more_where_smaller_ones_are_slow() -> None:
    clock = VirtualTime()
    hangs = detector(clock)
    hangs.on_sent(request("a"))
    hangs.on_message(Progress("a", "denoising", 0, 10))
    assert silence(hangs, clock) == pytest.approx(HANG_S, abs=0.2)
    hangs.on_engine_gone()
    run(hangs, clock, request("b"), 1.0)
    hangs.on_sent(request("large", side=128))
    hangs.on_message(Progress("large", "denoising", 0, 10))
    assert silence(hangs, clock) == pytest.approx(16 * FACTOR, abs=0.2)  # 4 times the pixels, squared


def test_while_blocks_compile_or_an_encoder_is_loaded_a_first_step_takes_longer() -> None:
    config = RunConfig()
    assert first_step_s(config) == config.serve.hang_s
    config.model.text.keep_loaded = False
    assert first_step_s(config) == config.launch.start_timeout_s
    config.engine.optimize = Optimize.compile
    assert first_step_s(config) == config.launch.collective_timeout_s


def test_the_time_of_a_text_does_not_depend_on_the_image() -> None:
    clock = VirtualTime()
    hangs = detector(clock)
    hangs.on_sent(request("a"))
    hangs.on_message(Progress("a", "text_encoding", 0, 0))
    clock.time_s += 10.0
    hangs.on_message(Progress("a", "denoising", 0, 10))
    hangs.on_message(GenerationResult("a", [], [], 1.0))
    hangs.on_sent(request("b", side=128))
    hangs.on_message(Progress("b", "text_encoding", 0, 0))
    assert silence(hangs, clock) == pytest.approx(10.0 * FACTOR, abs=0.2)


def test_a_request_that_begins_never_is_found_and_one_that_waits_for_others_is_not() -> None:
    clock = VirtualTime()
    hangs = detector(clock)
    hangs.on_sent(request("first", steps=400))
    hangs.on_sent(request("waits"))
    hangs.on_message(Progress("waits", QUEUED, 1, 0))
    run(hangs, clock, request("first", steps=400), 1.0)
    assert silence(hangs, clock) == pytest.approx(HANG_S, abs=0.2)


def test_a_small_step_waits_for_the_large_one_that_it_shares_forwards_with() -> None:
    clock = VirtualTime()
    hangs = detector(clock)
    run(hangs, clock, request("small"), 0.05)
    run(hangs, clock, request("large", side=128), 3.0)
    run(hangs, clock, request("small"), 0.05, answer=False)
    hangs.on_sent(request("large", side=128))
    hangs.on_message(Progress("large", "denoising", 0, 10))
    assert silence(hangs, clock) == pytest.approx(3.0 * FACTOR, abs=0.2)


def test_one_that_is_silent_beside_others_is_found_after_the_work_of_all() -> None:
    """With several replicas the others go on."""
    clock = VirtualTime()
    hangs = detector(clock)
    run(hangs, clock, request("a"), 0.5)
    run(hangs, clock, request("silent"), 0.5, answer=False)
    began = clock.time_s

    def others_go_on() -> None:
        for number in range(1000):
            run(hangs, clock, request(f"other {number}"), 0.5)

    with pytest.raises(EngineGone, match="no progress in denoising"):
        others_go_on()
    assert 2 * 10 * 0.5 < clock.time_s - began < 60


def test_a_failure_is_no_step_and_dead_ranks_are_forgotten() -> None:
    clock = VirtualTime()
    hangs = detector(clock)
    hangs.on_sent(request("a"))
    hangs.on_message(Progress("a", "denoising", 0, 10))
    clock.time_s += 20
    hangs.on_message(Failure("a", "cancelled", "the request was cancelled"))
    hangs.on_sent(request("b"))
    hangs.on_message(Progress("b", "denoising", 0, 10))
    assert silence(hangs, clock) == pytest.approx(HANG_S, abs=0.2)
    hangs.on_engine_gone()
    clock.time_s += 10_000
    hangs.check()


def test_time_in_which_this_process_did_not_run_does_not_count() -> None:
    clock = VirtualTime()
    own = OwnTime(clock.now)
    hangs = HangDetector(HANG_S, COLLECTIVE_S, own.now)
    hangs.on_sent(request("a"))
    hangs.on_message(Progress("a", "denoising", 0, 10))
    for _ in range(50):
        clock.time_s += 0.1
        hangs.check()
    clock.time_s += 3600.0
    hangs.check()
    assert own.lost_s == pytest.approx(3600, abs=1)
    assert silence(hangs, clock) == pytest.approx(HANG_S - 5, abs=0.3)


def test_a_stopped_process_is_found_and_one_that_goes_on_is_not() -> None:
    clock = VirtualTime()
    stopped = StoppedRanks(clock.now)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        pids = [os.getpid(), process.pid]
        for number in (signal.SIGSTOP, signal.SIGCONT, signal.SIGSTOP):
            process.send_signal(number)
            wait_for(lambda: is_stopped(process.pid) == (number == signal.SIGSTOP), "the signal")  # noqa: B023
            stopped.check(pids)
            clock.time_s += 0.9 * STOPPED_S
            stopped.check(pids)
        clock.time_s += 0.2 * STOPPED_S
        with pytest.raises(EngineGone, match=rf"rank 1 \(process {process.pid}\) was stopped"):
            stopped.check(pids)
        process.kill()
    assert not is_stopped(process.pid)
