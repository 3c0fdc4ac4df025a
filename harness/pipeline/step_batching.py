"""Requests that share network forwards.

Each runs through the stages on a stack of its own (a greenlet), and stops at every evaluation of the denoiser. Whoever
drives them evaluates what they stopped at together, and lets each go on with its own rows: solver, guidance and memory
stay one request's, whatever its number of steps, and a request joins or leaves between any two evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import torch
from greenlet import greenlet
from torch import Tensor, nn

from harness.pipeline.state import CacheStates, Evaluate, evaluate_directly
from models.components import Conditioning

T = TypeVar("T")


@contextmanager
def preserve_inference_mode() -> Iterator[None]:
    """Gives a stack its own inference mode back when it goes on: PyTorch keeps one a thread, whichever stack set it."""
    with torch.inference_mode(torch.is_inference_mode_enabled()):
        yield


@dataclass(frozen=True)
class PendingEvaluation:
    """An evaluation that a request waits for, as harness.pipeline.state.Evaluate makes it."""

    network: nn.Module
    latent: Tensor
    tau_B: Tensor
    condition: Conditioning
    cache_states: CacheStates = ()

    @property
    def batch_key(self) -> tuple[object, ...]:
        """What calls have in common that can be made in one: network, shape but for the batch, and what is told."""
        absent = tuple(getattr(self.condition, f.name) is None for f in fields(Conditioning) if f.name != "mask")
        return id(self.network), tuple(self.latent.shape[1:]), absent


class RequestFiber(Generic[T]):
    """One request on its way through the stages.

    Args:
        work: is handed how it evaluates the denoiser; its result is the course's.
    """

    def __init__(self, work: Callable[[Evaluate], T]) -> None:
        self.call: PendingEvaluation | None = None
        self._result: list[T] = []
        self._work = work
        self._fiber = greenlet(self._run)
        self._driver = greenlet.getcurrent()
        self._switch(None)

    @property
    def ended(self) -> bool:
        """Whether the work is done."""
        return bool(self._fiber.dead)

    @property
    def result(self) -> T:
        """Of the work.

        Raises:
            IndexError: it has not ended.
        """
        return self._result[0]

    def advance(self, output: Tensor | Exception) -> None:
        """Goes on to the next evaluation, or to the end, with the output of this one, or with what became of it.

        Raises:
            Exception: what the work raises.
        """
        self._switch(output)

    def _run(self, first: None) -> None:
        self._result.append(self._work(self._evaluate))

    def _switch(self, output: Tensor | Exception | None) -> None:
        self.call = None
        self._driver = self._fiber.parent = greenlet.getcurrent()
        with preserve_inference_mode():
            self._fiber.switch(output)

    def _evaluate(
        self, network: nn.Module, latent: Tensor, tau_B: Tensor, condition: Conditioning, cache_states: CacheStates = ()
    ) -> Tensor:
        self.call = PendingEvaluation(network, latent, tau_B, condition, cache_states)
        with preserve_inference_mode():
            output: Tensor | Exception = self._driver.switch()
        if isinstance(output, Exception):
            raise output
        return output


def evaluate(
    calls: Sequence[PendingEvaluation], retry_alone: bool, count: Callable[[int], None]
) -> list[Tensor | Exception]:
    """The output of each call, in their order; calls of a kind share a forward.

    Args:
        calls: of as many requests.
        apart: where a shared forward fails, its calls are made one by one, so that only those fail that cannot be made;
            ranks that compute a picture together cannot do so, and the exception is raised.
        count: told the rows of each forward.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, call in enumerate(calls):
        groups.setdefault(call.batch_key, []).append(index)
    outputs: dict[int, Tensor | Exception] = {}
    for members in groups.values():
        outputs |= zip(members, _evaluate_shared([calls[i] for i in members], retry_alone, count), strict=True)
    return [outputs[index] for index in range(len(calls))]


def _evaluate_shared(
    calls: list[PendingEvaluation], retry_alone: bool, count: Callable[[int], None]
) -> list[Tensor | Exception]:
    count(sum(len(call.latent) for call in calls))
    try:
        latent, tau_B = torch.cat([call.latent for call in calls]), torch.cat([call.tau_B for call in calls])
        condition = Conditioning.stack([call.condition for call in calls])
        cache_states = tuple(owner for call in calls for owner in call.cache_states)
        output = evaluate_directly(calls[0].network, latent, tau_B, condition, cache_states)
        return list(output.split([len(call.latent) for call in calls]))
    except Exception as error:
        if not retry_alone:
            raise
        if len(calls) == 1:
            return [error]
    return [result for call in calls for result in _evaluate_shared([call], retry_alone, count)]
