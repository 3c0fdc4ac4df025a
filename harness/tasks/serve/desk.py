"""The front desk: takes requests to the supervisor, sees each to its end, and keeps what can be fetched of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path

from harness.config.schema import RunConfig
from harness.messages import GenerationRequest
from harness.records.record import SampleRow, fingerprint
from harness.resolve.compose import to_dict
from harness.tasks.serve import saving
from harness.tasks.serve.jobs import Job
from harness.tasks.serve.metrics import Meter
from harness.tasks.serve.openai import Status
from harness.tasks.serve.problem import Problem, as_problem
from harness.tasks.serve.supervisor import Busy, NotServing, Supervisor
from harness.tasks.terminal import print_error

log = logging.getLogger(__name__)


class Order:
    """One accepted request. It is settled once its pictures are on disk, or there is a reason why there are none.

    Args:
        job: at the supervisor.
        user: what the client calls itself.
    """

    def __init__(self, job: Job, user: str | None) -> None:
        self.job = job
        self.user = user
        self.rows: list[SampleRow] = []
        self.problem: Problem | None = None
        self.settled = asyncio.Event()

    @property
    def id(self) -> str:
        """The request's."""
        return self.job.request.request_id

    @property
    def is_video(self) -> bool:
        """Whether videos were asked for."""
        return self.job.request.frames > 1

    @property
    def status(self) -> Status:
        """queued, running, done or failed; it is running while it is being saved."""
        if not self.settled.is_set():
            return "queued" if self.job.state == "queued" else "running"
        return "done" if self.problem is None else "failed"

    @property
    def stage(self) -> str:
        """The pipeline's, and saving after that."""
        return "saving" if self.job.answer is not None and not self.settled.is_set() else self.job.stage


class Desk:
    """What the routes ask.

    Args:
        config: of the server.
        supervisor: of the ranks.
        folder: of the run.
    """

    def __init__(self, config: RunConfig, supervisor: Supervisor, folder: Path) -> None:
        self.config = config
        self.supervisor = supervisor
        self.meter = Meter(supervisor)
        self._folder = folder
        self._fingerprint = fingerprint(to_dict(config))
        self._orders: dict[str, Order] = {}
        self._following: set[asyncio.Task[None]] = set()

    def accept(self, request: GenerationRequest, user: str | None) -> Order:
        """Queues a request.

        Raises:
            Problem: the queue is full, or nothing is drawn any more.
        """
        try:
            job = self.supervisor.submit(request)
        except (Busy, NotServing) as error:
            code = "busy" if isinstance(error, Busy) else "not_serving"
            self.meter.count(code)
            raise Problem(code, str(error), retry_after_s=error.retry_after_s) from error
        order = Order(job, user)
        known = self.supervisor.jobs
        self._orders = {id: o for id, o in self._orders.items() if id in known or not o.settled.is_set()}
        self._orders[order.id] = order
        self._follow(self._settle(order))
        return order

    def order(self, request_id: str) -> Order:
        """One of those that are outstanding, or answered and kept.

        Raises:
            Problem: there is no such request.
        """
        found = self._orders.get(request_id)
        if found is None:
            raise Problem("not_found", f"there is no request {request_id}; /v1/requests lists those that are kept")
        return found

    def orders(self) -> list[Order]:
        """All of them, the newest first."""
        return list(reversed(self._orders.values()))

    def cancel(self, order: Order) -> None:
        """Stops a request: at once where it waits, within a solver step where it is drawn."""
        if not order.settled.is_set():
            self.supervisor.cancel(order.id)

    def forget(self, order: Order) -> None:
        """Stops a request, and removes its pictures once it has stopped."""
        self.cancel(order)
        self._orders.pop(order.id, None)
        self._follow(self._discard(order))

    def files(self, order: Order) -> list[Path]:
        """The pictures of a request.

        Raises:
            Problem: there are none, or not yet.
        """
        if not order.settled.is_set():
            raise Problem("not_done", f"the request is {order.status}; ask again when it is done", retry_after_s=1.0)
        if order.problem is not None:
            raise order.problem
        return [self._folder / row.path for row in order.rows]

    async def close(self) -> None:
        """Returns when all that was answered has been saved."""
        await asyncio.gather(*self._following)

    def _follow(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._following.add(task)
        task.add_done_callback(self._following.discard)

    async def _discard(self, order: Order) -> None:
        await order.settled.wait()
        await asyncio.to_thread(saving.remove, self._folder, order.rows)

    async def _settle(self, order: Order) -> None:
        """Whatever happens, the request is settled."""
        await order.job.wait()
        try:
            await asyncio.to_thread(self._save, order)
        except OSError as error:
            order.problem = Problem("not_saved", f"the pictures could not be saved ({reason(error)}); make room there")
        except Exception as error:
            log.exception("request %s", order.id)
            order.problem = as_problem(error)
        finally:
            order.job.pixels.clear()  # they are on disk, and a server keeps many jobs
            await asyncio.to_thread(self._note, order)
            self.meter.count(outcome(order))
            if order.problem is None:
                self.meter.measure(order.job)
            order.settled.set()

    def _save(self, order: Order) -> None:
        """The pictures of an answered request; in a thread of its own."""
        job, fps = order.job, self.config.model.fps
        if job.failure is not None:
            order.problem = Problem.of(job.failure)
        elif job.answer is not None:
            order.rows = saving.save(self._folder, job.request, job.answer.samples, job.pixels, fps, self._fingerprint)

    def _note(self, order: Order) -> None:
        """Its line."""
        if order.problem is not None and order.job.failure is None:
            print_error(f"request {order.id}: {order.problem.message}")
        try:
            saving.append(self._folder, row(order))
        except OSError as error:
            print_error(f"request {order.id} has no line in {saving.LINES} ({reason(error)}); make room there")


def outcome(order: Order) -> str:
    """ok, or the code of what went wrong."""
    return "ok" if order.problem is None else order.problem.code


def reason(error: OSError) -> str:
    """What the system says, without the file's name."""
    return error.strerror or str(error)


def row(order: Order) -> saving.RequestRow:
    """The line of a request that was answered."""
    job = order.job
    return saving.RequestRow(
        request=job.request,
        outcome=outcome(order),
        arrived=job.arrived,
        began=job.began,
        ended=job.ended,
        total_ms=None if job.answer is None else job.answer.total_duration_ms,
        user=order.user,
        error=None if order.problem is None else order.problem.message,
        samples=order.rows,
    )
