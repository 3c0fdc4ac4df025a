"""Requests that share forwards: each image equals the one made alone, whichever request joins, leaves or fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from harness.pipeline.state import Cancelled, Evaluate, Evaluation
from harness.pipeline.step_batching import RequestFiber, evaluate
from models.components import Conditioning


class Doubling(nn.Module):
    """Doubles its input and records its batches; fails on a negative row or a batch that is too large."""

    def __init__(self, most: int = 100) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.most = most

    def forward(self, latent: Tensor, tau_B: Tensor, condition: Conditioning) -> Tensor:
        self.batches.append(len(latent))
        if len(latent) > self.most:
            raise MemoryError("too large a batch")
        if (latent < 0).any():
            raise ValueError("negative")
        return 2 * latent + tau_B.view(-1, 1) * 0


def call(network: nn.Module, rows: int, value: float = 1.0, width: int = 3) -> Evaluation:
    return Evaluation(
        network, torch.full((rows, width), value), torch.zeros(rows), Conditioning(labels=torch.zeros(rows))
    )


def ignore(rows: int) -> None:
    return None


def alike(error: Exception) -> bool:
    """Every rank of the replica has raised it."""
    return True


def not_alike(error: Exception) -> bool:
    """Another rank waits in a collective."""
    return False


def test_calls_of_a_kind_share_a_forward_and_get_their_own_rows() -> None:
    network, counted = Doubling(), []
    calls = [call(network, 2, 1.0), call(network, 1, 2.0, width=4), call(network, 3, 3.0)]
    outputs = evaluate(calls, may_answer=alike, count=counted.append)
    assert network.batches == counted == [5, 1]
    for made, output in zip(calls, outputs, strict=True):
        assert isinstance(output, Tensor)
        assert torch.equal(output, 2 * made.latent)


def test_calls_with_other_inputs_do_not_share() -> None:
    network = Doubling()
    other = Evaluation(network, torch.ones(1, 3), torch.zeros(1), Conditioning(pooled=torch.ones(1, 3)))
    evaluate([call(network, 1), other], may_answer=alike, count=ignore)
    assert network.batches == [1, 1]


def test_only_the_call_that_cannot_be_made_fails() -> None:
    network = Doubling()
    outputs = evaluate([call(network, 1), call(network, 1, -1.0), call(network, 2)], may_answer=alike, count=ignore)
    assert [isinstance(output, Tensor) for output in outputs] == [True, False, True]
    assert str(outputs[1]) == "negative"


def test_a_batch_that_does_not_fit_is_made_one_by_one() -> None:
    network = Doubling(most=2)
    outputs = evaluate([call(network, 2), call(network, 2)], may_answer=alike, count=ignore)
    assert all(isinstance(output, Tensor) for output in outputs)
    assert network.batches == [4, 2, 2]


def test_ranks_that_compute_together_do_not_try_again() -> None:
    with pytest.raises(ValueError, match="negative"):
        evaluate([call(Doubling(), 1), call(Doubling(), 1, -1.0)], may_answer=not_alike, count=ignore)


def doubled(times: int, network: nn.Module) -> RequestFiber[float]:
    def work(evaluation: Evaluate) -> float:
        x = torch.ones(1, 3)
        with torch.inference_mode():
            for _ in range(times):
                x = evaluation(Evaluation(network, x, torch.zeros(1), Conditioning()))
        return float(x[0, 0])

    return RequestFiber(work)


def drive(courses: list[RequestFiber[float]]) -> None:
    while waiting := [(fiber, fiber.call) for fiber in courses if fiber.call is not None]:
        outputs = evaluate([c for _, c in waiting], may_answer=alike, count=ignore)
        for (fiber, _), output in zip(waiting, outputs, strict=True):
            fiber.advance(output)


def test_courses_of_unequal_length_share_while_they_run() -> None:
    network = Doubling()
    courses = [doubled(times, network) for times in (3, 1, 5)]
    drive(courses)
    assert [fiber.result for fiber in courses] == [8.0, 2.0, 32.0]
    assert network.batches == [3, 2, 2, 1, 1]
    assert all(fiber.finished for fiber in courses)


def test_a_fiber_without_an_evaluation_has_ended() -> None:
    fiber = doubled(0, Doubling())
    assert fiber.finished
    assert fiber.result == 1.0


def test_an_exception_in_place_of_an_output_is_raised_in_its_fiber_alone() -> None:
    network = Doubling()
    caught: list[str] = []

    def work(evaluation: Evaluate) -> float:
        try:
            evaluation(Evaluation(network, torch.ones(1, 3), torch.zeros(1), Conditioning()))
        except Cancelled:
            caught.append("cancelled")
        return 0.0

    stopped, other = RequestFiber(work), doubled(2, network)
    stopped.advance(Cancelled())
    assert caught == ["cancelled"]
    assert stopped.finished
    drive([other])
    assert other.result == 4.0


def test_what_a_course_raises_reaches_whoever_drives_it() -> None:
    fiber = doubled(2, Doubling())
    with pytest.raises(RuntimeError, match="planted"):
        fiber.advance(RuntimeError("planted"))
    assert fiber.finished


def test_each_stack_keeps_its_own_inference_mode() -> None:
    """Of two that overlap, the first to end would otherwise leave the other's mode behind for all later code."""
    modes: list[bool] = []

    def work(evaluation: Evaluate) -> float:
        with torch.inference_mode():
            for _ in range(3):
                evaluation(Evaluation(Doubling(), torch.ones(1, 3), torch.zeros(1), Conditioning()))
                modes.append(torch.is_inference_mode_enabled())
        return 0.0

    one = RequestFiber(work)
    other = RequestFiber(work)
    assert not torch.is_inference_mode_enabled()
    drive([one, other])
    assert modes == [True] * 6
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
