"""Step batching: requests that share network forwards.

Each request runs through the stages on a stack of its own (a greenlet), and pauses at every evaluation of the denoiser.
A driver computes the pending evaluations together, and resumes each request with its own rows. So solver, guidance and
state belong to one request, whatever its number of steps, and a request joins or leaves between any two evaluations.
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
    """Restore the inference mode of this fiber when it resumes: PyTorch has one per thread, whichever fiber set it.

    Yields:
        Nothing, while another fiber runs.
    """
    with torch.inference_mode(torch.is_inference_mode_enabled()):
        yield


@dataclass(frozen=True)
class PendingEvaluation:
    """An evaluation that a request waits for, with the arguments of harness.pipeline.state.Evaluate.

    Args:
        network: the denoiser.
        latent: the network's input, (B, ...).
        tau_B: the time of each row.
        condition: the conditioning, B rows.
        cache_states: the cache state of each row's image.
    """

    network: nn.Module
    latent: Tensor
    tau_B: Tensor
    condition: Conditioning
    cache_states: CacheStates = ()

    @property
    def batch_key(self) -> tuple[object, ...]:
        """What evaluations in one forward have in common: network, shape of a row, and fields of the conditioning."""
        absent = tuple(getattr(self.condition, f.name) is None for f in fields(Conditioning) if f.name != "mask")
        return id(self.network), tuple(self.latent.shape[1:]), absent


class RequestFiber(Generic[T]):
    """One request on its way through the stages.

    Args:
        work: runs the stages, with the given function to evaluate the denoiser; its result is that of the fiber.

    Attributes:
        call: the evaluation that the request waits for; None once it has ended.
    """

    def __init__(self, work: Callable[[Evaluate], T]) -> None:
        self.call: PendingEvaluation | None = None
        self._result: list[T] = []
        self._work = work
        self._fiber = greenlet(self._run)
        self._driver = greenlet.getcurrent()
        self._switch(None)

    @property
    def finished(self) -> bool:
        """Whether the work is done."""
        return bool(self._fiber.dead)

    @property
    def result(self) -> T:
        """The result of the work.

        Raises:
            IndexError: if the work has not ended.
        """
        return self._result[0]

    def advance(self, output: Tensor | Exception) -> None:
        """Resume until the next evaluation or the end.

        Args:
            output: the output of the pending evaluation, or the exception to raise instead.

        Raises:
            Exception: whatever the work raises.
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
    """Compute pending evaluations; those with the same batch key share a forward.

    Args:
        calls: the evaluations, of different requests.
        retry_alone: whether to compute the evaluations one by one if a shared forward fails, so that only the bad ones
            fail. Ranks that compute an image together cannot do so; then the exception is raised.
        count: called with the rows of each forward.

    Returns:
        The output, or the exception, of each evaluation, in order.
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
        cache_states = tuple(state for call in calls for state in call.cache_states)
        output = evaluate_directly(calls[0].network, latent, tau_B, condition, cache_states)
        return list(output.split([len(call.latent) for call in calls]))
    except Exception as error:
        if not retry_alone:
            raise
        if len(calls) == 1:
            return [error]
    return [result for call in calls for result in _evaluate_shared([call], retry_alone, count)]
