"""Step batching: requests that share network forwards.

Each request runs through the stages on a stack of its own (a greenlet), and pauses at every evaluation of the denoiser.
A driver computes the pending evaluations together, and resumes each request with its own rows. So solver, guidance and
state belong to one request, whatever its number of steps, and a request joins or leaves between any two evaluations.
A fiber may also pause elsewhere, so that other requests have their turn before a long stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from greenlet import greenlet
from torch import Tensor

from harness.pipeline.state import Evaluate, Evaluation, evaluate_directly

T = TypeVar("T")


@contextmanager
def preserve_inference_mode() -> Iterator[None]:
    """Restore the inference mode of this fiber when it resumes: PyTorch has one per thread, whichever fiber set it.

    Yields:
        Nothing, while another fiber runs.
    """
    with torch.inference_mode(torch.is_inference_mode_enabled()):
        yield


class RequestFiber(Generic[T]):
    """One request on its way through the stages.

    Args:
        work: runs the stages, with the given function to evaluate the denoiser; its result is that of the fiber.

    Attributes:
        call: the evaluation that the request waits for; None once it has ended, and while it is paused.
    """

    def __init__(self, work: Callable[[Evaluate], T]) -> None:
        self.call: Evaluation | None = None
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
    def paused(self) -> bool:
        """Whether it waits between two stages, not for an evaluation."""
        return self.call is None and not self.finished

    @property
    def result(self) -> T:
        """The result of the work.

        Raises:
            IndexError: if the work has not ended.
        """
        return self._result[0]

    def advance(self, output: Tensor | Exception | None) -> None:
        """Resume until the next evaluation, the next pause or the end.

        Args:
            output: the output of the pending evaluation (None for a pause), or the exception to raise instead.

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

    def _evaluate(self, evaluation: Evaluation) -> Tensor:
        self.call = evaluation
        with preserve_inference_mode():
            output: Tensor | Exception = self._driver.switch()
        if isinstance(output, Exception):
            raise output
        return output


def pause() -> None:
    """Pause the fiber that calls this until its driver advances it.

    Raises:
        Exception: whatever the driver passes in place of None.
    """
    driver = greenlet.getcurrent().parent
    assert driver is not None, "only a fiber can pause"
    with preserve_inference_mode():
        error: Exception | None = driver.switch()
    if error is not None:
        raise error


def evaluate(
    calls: Sequence[Evaluation], may_answer: Callable[[Exception], bool], count: Callable[[int], None]
) -> list[Tensor | Exception]:
    """Compute pending evaluations; those with the same batch key share a forward.

    If a shared forward fails, its evaluations are computed one by one, so that only the bad ones fail.

    Args:
        calls: the evaluations, of different requests.
        may_answer: returns whether the requests may be answered after an exception. It is false if other ranks, which
            compute the same images, did not raise it; then the exception is raised.
        count: called with the rows of each forward.

    Returns:
        The output, or the exception, of each evaluation, in order.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, call in enumerate(calls):
        groups.setdefault(call.batch_key, []).append(index)
    outputs: dict[int, Tensor | Exception] = {}
    for members in groups.values():
        outputs |= zip(members, _evaluate_shared([calls[i] for i in members], may_answer, count), strict=True)
    return [outputs[index] for index in range(len(calls))]


def _evaluate_shared(
    calls: list[Evaluation], may_answer: Callable[[Exception], bool], count: Callable[[int], None]
) -> list[Tensor | Exception]:
    count(sum(len(call.latent) for call in calls))
    try:
        output = evaluate_directly(Evaluation.stack(calls))
        return list(output.split([len(call.latent) for call in calls]))
    except Exception as error:
        if not may_answer(error):
            raise
        if len(calls) == 1:
            return [error]
    return [result for call in calls for result in _evaluate_shared([call], may_answer, count)]
