"""What a client is shown of a request."""

from __future__ import annotations

from typing import Literal

from fastapi import Request

from harness.config.schema import RunConfig
from harness.resolve.request import to_message
from harness.tasks.serve import openai
from harness.tasks.serve.service import Order


def request_object(order: Order, http: Request) -> openai.RequestObject:
    """A request as it stands.

    Args:
        order: the request.
        http: by which somebody asks; addresses begin as its own.
    """
    job, request = order.job, order.job.request
    return openai.RequestObject(
        id=order.id,
        status=order.status,
        stage=order.stage,
        ahead=job.ahead,
        done=job.done,
        total=job.total or request.steps,
        prompt=request.prompts[0],
        n=request.samples_per_prompt,
        steps=request.steps,
        seed=request.seed,
        guidance=request.guidance,
        size=size(order),
        frames=request.frames,
        created_at=job.arrived,
        began_at=job.began,
        completed_at=job.ended if order.settled.is_set() else None,
        urls=[address(http, order, k) for k in range(len(order.rows))] if order.settled.is_set() else [],
        error=error(order),
    )


def video_object(order: Order, config: RunConfig) -> openai.Video:
    """A video as OpenAI's clients expect it."""
    job, request = order.job, order.job.request
    done = order.status == "done"
    names: dict[str, Literal["queued", "in_progress", "completed", "failed"]] = {
        "queued": "queued",
        "running": "in_progress",
        "done": "completed",
        "failed": "failed",
    }
    return openai.Video(
        id=order.id,
        model=config.model.name,
        status=names[order.status],
        progress=100 if done else 100 * job.done // (job.total + 1),  # decoding and saving come after the last step
        created_at=int(job.arrived),
        completed_at=int(job.ended) if done and job.ended is not None else None,
        prompt=request.prompts[0],
        seconds=f"{request.frames / config.model.fps:g}",
        size=size(order),
        error=error(order),
    )


def defaults(config: RunConfig) -> openai.Defaults:
    """What a server draws where it is not told, and how much it draws."""
    own, model, serve = to_message(config.request), config.model, config.serve
    return openai.Defaults(
        scheduler=config.scheduler.family,
        solver=config.scheduler.solver.name,
        steps=own.steps,
        guidance=own.guidance,
        size=f"{own.width}x{own.height}",
        frames=own.frames,
        fps=model.fps,
        size_multiple=model.size_multiple,
        max_pixels=model.max_pixels,
        max_steps=serve.max_steps,
        max_pictures=serve.max_pictures,
        max_frames=model.max_frames,
        timeout_s=serve.timeout_s,
    )


def drawn(order: Order) -> openai.Drawn:
    """What was drawn, and how long it took."""
    job, request = order.job, order.job.request
    began, ended = job.began or job.arrived, job.ended or job.arrived
    return openai.Drawn(
        request_id=order.id,
        seed=request.seed,
        steps=request.steps,
        guidance=request.guidance,
        queued_ms=1e3 * (began - job.arrived),
        total_ms=1e3 * (ended - job.arrived),
    )


def size(order: Order) -> str:
    """WIDTHxHEIGHT."""
    return f"{order.job.request.width}x{order.job.request.height}"


def error(order: Order) -> openai.JobError | None:
    """Why there is no picture, once that is known."""
    problem = order.problem if order.settled.is_set() else None
    return None if problem is None else openai.JobError(code=problem.code, message=problem.message)


def address(http: Request, order: Order, index: int) -> str:
    """Where a picture of a request is."""
    return f"{str(http.base_url).rstrip('/')}/v1/requests/{order.id}/content/{index}"
