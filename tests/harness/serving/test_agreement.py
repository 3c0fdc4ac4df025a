"""What all ranks of a replica raise alike is answered; what one rank raises alone ends the engine."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch import Tensor

from harness.device.memory import ResidentMemory
from harness.messages import RankOutcome, decode
from harness.parallel import process_groups
from harness.parallel.mesh import RankPosition
from harness.parallel.process_groups import make_process_groups
from harness.serving.faults import is_in_collective
from harness.serving.parts import Part
from harness.serving.rank_batch import RankBatch, Tick
from harness.serving.worker import Worker
from tests.fixtures.parallel.ranks import on_ranks
from tests.fixtures.serving.toy_replicas import RecordingDecoder, RecordingNetwork, toy_worker
from tests.fixtures.toy_pipeline import ToyEncoder, request


def nothing(latent: Tensor) -> None:
    return None


def fails(latent: Tensor) -> None:
    raise NotImplementedError("planted fault")


def spoils(latent: Tensor) -> None:
    latent.fill_(float("nan"))


class TwoRanks:
    """The worker of one of two ranks that compute the same images."""

    def __init__(self, rank: int) -> None:
        self.network, self.decoder = RecordingNetwork(), RecordingDecoder()
        position = RankPosition(rank, (1, 1, 1, 1, 2))
        groups = make_process_groups(position, torch.device("cpu"), timedelta(seconds=20))
        pipeline = toy_worker(0, 1, self.network, self.decoder, ToyEncoder()).pipeline
        self.worker = Worker(pipeline, position, torch.device("cpu"), ResidentMemory(), groups=groups)

    def answer(
        self, run: Callable[[Worker], str], on_forward: Callable[[Tensor], None], on_decode: Callable[[Tensor], None]
    ) -> str:
        self.network.on_forward, self.decoder.on_decode = on_forward, on_decode
        return run(self.worker)


def one_after_another(worker: Worker) -> str:
    outcome = decode(worker.generate(request(), lambda stage, done, total: None, lambda: False))
    assert isinstance(outcome, RankOutcome)
    return "ok" if outcome.failure is None else outcome.failure.message


def step_by_step(worker: Worker) -> str:
    batch, part = RankBatch(worker), Part(request(prompts=["red"]), 0, "client")
    frames = batch.tick(Tick(begin=[part]))
    while batch.parts:
        running = batch.parts[part.key]
        is_paused = running.fiber.paused
        frames = batch.tick(Tick(decode=[part.key]) if is_paused else Tick(forward=[part.key]))
    outcome = decode(frames[1:])
    assert isinstance(outcome, RankOutcome)
    return "ok" if outcome.failure is None else outcome.failure.message


def raise_alike(rank: int, size: int) -> dict[str, Tensor]:
    """Both ranks raise; afterwards they still generate."""
    ranks = TwoRanks(rank)
    for run in (one_after_another, step_by_step):
        assert ranks.answer(run, nothing, fails) == "planted fault"
        assert ranks.answer(run, fails, nothing) == "planted fault"
        assert "not finite" in ranks.answer(run, spoils, nothing)
        # a value that is not finite on one rank alone is agreed on before anybody goes on
        assert "not finite" in ranks.answer(run, spoils if rank else nothing, nothing)
        assert "not finite" in ranks.answer(run, nothing, nothing if rank else spoils)
        assert ranks.answer(run, nothing, nothing) == "ok"
    return {}


def raise_alone(rank: int, size: int) -> dict[str, Tensor]:
    process_groups.AGREE = timedelta(seconds=1)
    ranks = TwoRanks(rank)
    with pytest.raises(NotImplementedError if rank else RuntimeError, match="planted fault" if rank else "peer"):
        ranks.answer(one_after_another, nothing, fails if rank else nothing)
    return {}


def test_what_all_ranks_raise_is_answered() -> None:
    on_ranks(2, raise_alike)


def test_what_one_rank_raises_alone_ends_it() -> None:
    on_ranks(2, raise_alone)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("[gloo] Timed out waiting 5000ms for recv operation to complete", True),
        ("Connection closed by peer [127.0.0.1]:1234", True),
        ("the prompt is too long", False),
    ],
)
def test_an_error_of_a_collective_is_not_answered(message: str, expected: bool) -> None:
    assert is_in_collective(RuntimeError(message)) is expected
