"""A supervisor without ranks: one request after another, flat pictures, and failures on demand."""

import asyncio

import numpy as np

from harness.config.schema import RunConfig
from harness.messages import (
    ArrayRef,
    EngineInfo,
    Failure,
    GenerationRequest,
    GenerationResult,
    Progress,
    SampleResult,
    encode,
)
from harness.tasks.serve.jobs import GenerationJob
from harness.tasks.serve.supervisor import NotServing, QueueFull

FAILURES = ("oom", "failed", "expired", "rejected", "unsupported", "busy")  # a prompt of this name ends so


class Planted:
    """What harness.tasks.serve.supervisor.Supervisor is to the routes.

    Args:
        config: resolved.
        step_s: of each solver step.
    """

    def __init__(self, config: RunConfig, step_s: float = 0.0) -> None:
        self.state, self.reason, self.restarts = "ready", "", 0
        self.info = EngineInfo("ready", 1, [1], evaluations=7)
        self.jobs: dict[str, GenerationJob] = {}
        self.drawn: list[GenerationRequest] = []
        self.step_s = step_s
        self._config = config
        self._cancelled: set[str] = set()
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, request: GenerationRequest) -> GenerationJob:
        if self.state in ("failed", "stopping"):
            raise NotServing(self.reason, 60.0)
        waiting = sum(job.state == "queued" for job in self.jobs.values())
        if waiting >= self._config.serve.max_queue:
            raise QueueFull(f"{waiting} requests wait", 2.5)
        job = self.jobs[request.request_id] = GenerationJob(request, ahead=waiting)
        task = asyncio.create_task(self._draw(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    def cancel(self, request_id: str) -> bool:
        self._cancelled.add(request_id)
        return True

    async def _draw(self, job: GenerationJob) -> None:
        request = job.request
        async with self._turn:
            for step in range(request.steps):
                if request.request_id in self._cancelled:
                    return job.fail(Failure(request.request_id, "cancelled", "the request was cancelled"))
                job.on_progress(Progress(request.request_id, "denoising", step, request.steps))
                await asyncio.sleep(self.step_s)
            if request.prompts[0] in FAILURES:
                return job.fail(Failure(request.request_id, request.prompts[0], "planted", rank=1))
            self.drawn.append(request)
            job.finish(*picture(request))


def picture(request: GenerationRequest) -> tuple[GenerationResult, list[bytes]]:
    """Flat pictures, the first black and every next one a little lighter."""
    shape = (3, request.height, request.width)
    shape = shape if request.frames == 1 else (request.frames, *shape)
    arrays = [np.full(shape, k / 10, np.float32) for k in range(request.samples_per_prompt)]
    samples = [
        SampleResult(k, request.prompts[0], request.seed + k, ArrayRef(k + 1, "float32", shape))
        for k in range(len(arrays))
    ]
    result = GenerationResult(request.request_id, samples, [], 12.0)
    return result, encode(result, arrays)
