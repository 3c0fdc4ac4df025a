"""Which images share the next forward: turns by work between clients, and the shortest first within a client."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from harness.pipeline.state import Evaluate, Evaluation
from harness.pipeline.step_batching import RequestFiber
from harness.serving.parts import Part
from harness.serving.rank_batch import RunningPart
from harness.serving.replica import FORWARD_S, PATIENCE, BatchLimits, ForwardPlanner
from harness.serving.speed import SpeedEstimate
from models.components import Conditioning
from tests.fixtures.toy_pipeline import request

NETWORK = nn.Identity()
DEFAULT = 2.0 * 16 * 16
DEFAULT_S = 0.1
STEPS = 4


def running(
    client: str, name: str, index: int = 0, side: int = 16, guidance: float = 3.0, began: float = 0.0
) -> RunningPart:
    """Return a part that waits for an evaluation."""
    rows = 1 if guidance == 1 else 2

    def work(evaluate: Evaluate) -> list[bytes]:
        evaluate(Evaluation(NETWORK, torch.zeros(rows, 4, side, side), torch.zeros(rows), Conditioning()))
        return []

    requested = request(request_id=name, prompts=["red"], steps=STEPS, height=side, width=side, guidance=guidance)
    return RunningPart(Part(requested, index, client), RequestFiber(work), [], STEPS, began)


def planner(max_batch: int = 4, speed: SpeedEstimate | None = None) -> ForwardPlanner:
    return ForwardPlanner(BatchLimits(max_batch, DEFAULT), speed or SpeedEstimate())


def known_speed() -> SpeedEstimate:
    """Return what is known after a forward of a default image that took DEFAULT_S."""
    speed = SpeedEstimate()
    speed.observe(DEFAULT, DEFAULT, DEFAULT_S)
    return speed


def lead(plan: ForwardPlanner, waiting: list[RunningPart]) -> str:
    """Return the request of the only image in the next forward."""
    (key,) = plan.plan(waiting).forward
    return key[0]


def work_by_request(plan: ForwardPlanner, waiting: list[RunningPart], forwards: int) -> Counter[str]:
    """Return the work that each request gets in some forwards."""
    found: Counter[str] = Counter()
    by_key = {each.part.key: each for each in waiting}
    for _ in range(forwards):
        tick = plan.plan(waiting)
        for key in tick.forward:
            by_key[key].evaluations += 1
            found[key[0]] += int(by_key[key].part.work / (2 if tick.by_row else 1))
    return found


@pytest.mark.parametrize(("side", "guidance", "images"), [(16, 3.0, 4), (16, 1.0, 8), (32, 3.0, 1), (32, 1.0, 2)])
def test_a_forward_has_the_work_of_max_batch_default_images(side: int, guidance: float, images: int) -> None:
    waiting = [running("a", "many", k, side, guidance) for k in range(12)]
    assert len(planner().plan(waiting).forward) == images


def test_clients_get_equal_work_whatever_their_number_of_requests() -> None:
    waiting = [running("greedy", f"greedy {k}", 0, side=32) for k in range(5)] + [running("modest", "modest")]
    found = work_by_request(planner(), waiting, 500)
    greedy = sum(work for name, work in found.items() if name != "modest")
    assert found["modest"] == pytest.approx(greedy, rel=0.02)


def test_equal_images_of_a_client_end_one_after_another() -> None:
    """Those that are furthest go on, so that the first ones end early and the last ones no later."""
    waiting = [running("a", "many", k, began=float(k)) for k in range(6)]
    plan, ended = planner(2, known_speed()), []
    for _ in range(6 * STEPS // 2):
        forward = plan.plan(waiting).forward
        for each in waiting:
            each.steps_left -= each.part.key in forward
        ended += [each.part.key[1] for each in waiting if not each.steps_left]
        waiting = [each for each in waiting if each.steps_left]
    assert (ended, waiting) == ([0, 1, 2, 3, 4, 5], [])


@pytest.mark.parametrize(("later_s", "first"), [(0.9, "short"), (1.1, "long")])
def test_a_short_image_passes_a_long_one_of_its_client_that_began_not_long_before(later_s: float, first: str) -> None:
    long, short = running("a", "long", side=32), running("a", "short")
    needs_less_s = STEPS * DEFAULT_S * (4 - 1)
    short.began = later_s * PATIENCE * needs_less_s
    assert lead(planner(1, known_speed()), [long, short]) == first


def test_the_first_image_is_first_while_the_speed_is_not_known() -> None:
    waiting = [running("a", "short", began=1.0), running("a", "long", side=32)]
    assert lead(planner(1), waiting) == "long"


def test_an_image_that_is_very_small_does_not_pass_for_free() -> None:
    """Its forward takes as long as that of a larger one, so it counts like it."""
    waiting = [running("tiny", "tiny", side=2), running("a", "normal", side=16)]
    work_by_request(planner(1), waiting, 500)
    assert waiting[0].evaluations == pytest.approx(4 * waiting[1].evaluations, rel=0.02)


def test_others_of_the_same_size_ride_along() -> None:
    waiting = [running("a", "one"), running("b", "other size", side=8), running("c", "two"), running("c", "three")]
    assert sorted(key[0] for key in planner().plan(waiting).forward) == ["one", "three", "two"]


def test_a_forward_takes_no_longer_than_it_must() -> None:
    speed = SpeedEstimate()
    speed.observe(DEFAULT, DEFAULT, 0.4 * FORWARD_S)
    waiting = [running("a", "many", k) for k in range(4)]
    assert len(planner(speed=speed).plan(waiting).forward) == 2
    speed = SpeedEstimate()
    speed.observe(DEFAULT, DEFAULT, 3 * FORWARD_S)
    tick = planner(speed=speed).plan(waiting)
    assert (len(tick.forward), tick.by_row) == (1, True)
    unguided = [running("a", "one", guidance=1.0)]
    tick = planner(speed=speed).plan(unguided)
    assert (len(tick.forward), tick.by_row) == (1, False)  # it cannot be divided
