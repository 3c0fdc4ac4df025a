"""Convert a request and its job to the JSON objects that clients receive."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastapi import Request

from harness.config.bounds import MAX_PREVIEWS
from harness.config.schema import RunConfig
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY
from harness.resolve.limits import no_previews
from harness.resolve.request import to_message
from harness.resolve.run import ResolvedRun
from harness.resolve.solvers import other_solvers
from harness.tasks.serve import openai
from harness.tasks.serve.problem import Problem
from harness.tasks.serve.service import RequestHandle

WORD = re.compile(r"[^\W_]+")
MAX_NAME_CHARS = 40


def request_object(handle: RequestHandle, http: Request, preview: bytes | None = None) -> openai.RequestObject:
    """Return the current state of a request.

    Args:
        handle: The handle of the request.
        http: The HTTP request that is being answered; URLs start with its base URL.
        preview: The preview to show, a PNG.
    """
    job, request = handle.job, handle.job.request
    return openai.RequestObject(
        id=handle.id,
        status=handle.status,
        stage=handle.stage,
        ahead=job.ahead,
        done=job.done,
        total=job.total or request.steps,
        stage_done=job.stage_done,
        stage_total=job.stage_total,
        elapsed_s=job.elapsed_s,
        prompt=request.prompts[0],
        negative_prompt=request.negative_prompt,
        n=request.samples_per_prompt,
        steps=request.steps,
        seed=request.seed,
        guidance=request.guidance,
        solver=request.solver or own_solver(http.app.state.service.config),
        previews=request.previews,
        size=size_text(handle),
        frames=request.frames,
        created_at=job.arrived_at,
        began_at=job.began_at,
        completed_at=job.ended_at if handle.settled.is_set() else None,
        urls=[content_url(http, handle, k) for k in range(len(handle.rows))] if handle.settled.is_set() else [],
        preview=None if preview is None else base64.b64encode(preview).decode(),
        error=job_error(handle),
    )


def video_object(handle: RequestHandle, config: RunConfig) -> openai.Video:
    """Return the current state of a video in the form of OpenAI's API.

    Args:
        handle: The handle of the request.
        config: The resolved configuration of the server.
    """
    job, request = handle.job, handle.job.request
    done = handle.status == "done"
    names: dict[str, Literal["queued", "in_progress", "completed", "failed"]] = {
        "queued": "queued",
        "running": "in_progress",
        "done": "completed",
        "failed": "failed",
    }
    return openai.Video(
        id=handle.id,
        model=config.model.name,
        status=names[handle.status],
        progress=100 if done else 100 * job.done // (job.total + 1),  # decoding and saving come after the last step
        created_at=int(job.arrived_at),
        completed_at=int(job.ended_at) if done and job.ended_at is not None else None,
        prompt=request.prompts[0],
        seconds=f"{request.frames / config.model.fps:g}",
        size=size_text(handle),
        error=job_error(handle),
    )


def defaults(config: RunConfig) -> openai.Defaults:
    """Return the values for missing fields of a request, and the server's limits."""
    own, model, serve = to_message(config.request), config.model, config.serve
    return openai.Defaults(
        scheduler=config.scheduler.family,
        solver=own_solver(config),
        solvers=other_solvers(ResolvedRun(config)),
        steps=own.steps,
        guidance=own.guidance,
        negative_prompt=own.negative_prompt,
        size=f"{own.width}x{own.height}",
        frames=own.frames,
        fps=model.fps,
        size_multiple=model.size_multiple,
        max_pixels=model.max_pixels,
        max_steps=serve.max_steps,
        max_images=serve.max_images,
        max_frames=model.max_frames,
        max_previews=0 if no_previews(config) else MAX_PREVIEWS,
        timeout_s=serve.timeout_s,
    )


def own_solver(config: RunConfig) -> str:
    """Return the name of the configuration's solver, or `published` if the checkpoint's own files choose it."""
    return PUBLISHED_FAMILY if config.scheduler.family == PUBLISHED_FAMILY else config.scheduler.solver.name


def generation_info(handle: RequestHandle, config: RunConfig) -> openai.GenerationInfo:
    """Return the settings and the times of an answered request."""
    job, request = handle.job, handle.job.request
    began, ended = job.began or job.arrived, job.ended or job.arrived
    return openai.GenerationInfo(
        request_id=handle.id,
        seed=request.seed,
        solver=request.solver or own_solver(config),
        steps=request.steps,
        guidance=request.guidance,
        queued_ms=1e3 * (began - job.arrived),
        total_ms=1e3 * (ended - job.arrived),
    )


def size_text(handle: RequestHandle) -> str:
    """Return the size as WIDTHxHEIGHT in pixels."""
    return f"{handle.job.request.width}x{handle.job.request.height}"


def job_error(handle: RequestHandle) -> openai.JobError | None:
    """Return the error of a settled request, or None."""
    problem = handle.problem if handle.settled.is_set() else None
    return None if problem is None else openai.JobError(code=problem.code, message=problem.message)


def content_url(http: Request, handle: RequestHandle, index: int) -> str:
    """Return the URL of one image or video of a request."""
    return f"{str(http.base_url).rstrip('/')}/v1/requests/{handle.id}/content/{index}"


def removal(handle: RequestHandle, index: int) -> str:
    """Return the message about a file that is no longer there."""
    return f"sample {index} of request {handle.id} was removed from the server's folder"


def read_base64(handle: RequestHandle, files: Sequence[Path]) -> list[str]:
    """Read the files of a request and encode each in base64.

    Args:
        handle: The handle of the request.
        files: The files of the request.

    Returns:
        One text per file.

    Raises:
        Problem: A file was removed.
    """
    texts: list[str] = []
    for index, file in enumerate(files):
        try:
            texts.append(base64.b64encode(file.read_bytes()).decode())
        except OSError:
            raise Problem("not_found", removal(handle, index)) from None
    return texts


def file_name(handle: RequestHandle, index: int, suffix: str) -> str:
    """Return the name under which a client saves a file: the words of the prompt, the seed and the steps.

    Args:
        handle: The handle of the request.
        index: The index of the image or video within the request.
        suffix: The suffix of the file, with its dot.
    """
    request = handle.job.request
    words = "-".join(WORD.findall(request.prompts[0].lower()))[:MAX_NAME_CHARS].strip("-")
    return f"{words or 'image'}-seed{request.seed_of(index)}-steps{request.steps}{suffix}"
