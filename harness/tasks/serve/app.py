"""The FastAPI application: the API routes behind the middleware, health and metrics, and the built-in page."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from harness.config.schema import RunConfig
from harness.records.provenance import version
from harness.tasks.serve import openai
from harness.tasks.serve.access import AccessKeys
from harness.tasks.serve.bounds import add_bounds
from harness.tasks.serve.docs import docs_page
from harness.tasks.serve.middleware import RequestGuard
from harness.tasks.serve.problem import STATUS, ErrorBody, Problem, install_error_handlers
from harness.tasks.serve.routes import ServiceDep, image_routes, model_routes, request_routes, video_routes
from harness.tasks.serve.service import GenerationService
from harness.tasks.serve.supervisor import Supervisor

PAGE_FILES = {"": "text/html", "page.css": "text/css", "docs.css": "text/css", "page.js": "text/javascript"}
UNHEALTHY = ("failed", "stopping")
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class DocumentedApp(FastAPI):
    """A FastAPI application whose OpenAPI document has the bounds of its server."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        if self.openapi_schema is None:
            add_bounds(super().openapi(), self.state.service.config)
        return super().openapi()


def make_app(config: RunConfig, supervisor: Supervisor, folder: Path, keys: AccessKeys | None = None) -> FastAPI:
    """Make the application of one server.

    Args:
        config: The resolved configuration of the server.
        supervisor: The supervisor of the ranks; the caller starts and stops it.
        folder: The run's folder, where images and videos are written.
        keys: The server's keys; None if everybody on loopback may use it.

    Returns:
        The application; its generation service is `app.state.service`.
    """
    responses: dict[int | str, dict[str, object]] = {
        status: {"model": ErrorBody} for status in sorted(set(STATUS.values()))
    }
    app = DocumentedApp(
        title="Triptych", version=version("triptych") or "", docs_url=None, redoc_url=None, responses=responses
    )
    app.state.service = GenerationService(config, supervisor, folder)
    install_error_handlers(app)
    for routes in (model_routes(), image_routes(), video_routes(), request_routes(), state_routes(), page_routes()):
        app.include_router(routes)
    app.add_middleware(RequestGuard, serve=config.serve, keys=keys)
    return app


def state_routes() -> APIRouter:
    """Return the routes for liveness, readiness and metrics."""
    router = APIRouter(tags=["state"])

    @router.get("/health")
    async def health(service: ServiceDep) -> openai.Health:
        """Answer 200 in starting, ready and restarting; 503 in failed and stopping, as nothing can be generated."""
        if service.supervisor.state in UNHEALTHY:
            raise Problem("not_serving", service.unready_reason, retry_after_s=1.0)
        return health_of(service)

    @router.get("/ready")
    async def ready(service: ServiceDep) -> openai.Health:
        """Answer 200 only while the ranks are ready; otherwise 503 with the reason."""
        if service.unready_reason:
            raise Problem("not_serving", service.unready_reason, retry_after_s=1.0)
        return health_of(service)

    @router.get("/metrics", response_class=Response)
    async def metrics(service: ServiceDep) -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def health_of(service: GenerationService) -> openai.Health:
    """Return the state of the server and its ranks."""
    supervisor, states = service.supervisor, [handle.status for handle in service.handles()]
    return openai.Health(
        state=supervisor.state,
        reason=supervisor.reason,
        model=service.config.model.name,
        ranks=0 if supervisor.info is None else supervisor.info.world_size,
        queued=states.count("queued"),
        running=states.count("running"),
        restarts=supervisor.restarts,
    )


def page_routes() -> APIRouter:
    """Return the routes of the built-in page and of the page of routes, which load nothing from other sites."""
    router, files = APIRouter(include_in_schema=False), importlib.resources.files(__package__)

    def add_file(name: str, media_type: str) -> None:
        text = files.joinpath(name or "page.html").read_text()

        @router.get(f"/{name}")
        async def page() -> Response:
            headers = {"content-security-policy": CONTENT_SECURITY_POLICY, "cache-control": "no-cache"}
            return Response(text, media_type=f"{media_type}; charset=utf-8", headers=headers)

    for name, media_type in PAGE_FILES.items():
        add_file(name, media_type)

    @router.get("/docs")
    async def docs(http: Request) -> Response:
        headers = {"content-security-policy": CONTENT_SECURITY_POLICY, "cache-control": "no-cache"}
        return Response(docs_page(http.app.openapi()), media_type="text/html; charset=utf-8", headers=headers)

    return router
