"""The application: the routes behind the guard, how the server is, and the built-in page."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from harness.config.schema import RunConfig
from harness.records.provenance import version
from harness.tasks.serve import openai
from harness.tasks.serve.middleware import Guard, is_local
from harness.tasks.serve.problem import STATUS, ErrorBody, Problem, install
from harness.tasks.serve.routes import TheDesk, image_routes, model_routes, request_routes, video_routes
from harness.tasks.serve.service import GenerationService
from harness.tasks.serve.supervisor import Supervisor

PAGE = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(config: RunConfig, supervisor: Supervisor, folder: Path) -> FastAPI:
    """The application of one server; its desk is `app.state.desk`.

    Args:
        config: resolved.
        supervisor: of the ranks; started and stopped by somebody else.
        folder: of the run, where pictures go.
    """
    answers: dict[int | str, dict[str, object]] = {
        status: {"model": ErrorBody} for status in sorted(set(STATUS.values()))
    }
    app = FastAPI(title="Triptych", version=version("triptych") or "", docs_url=None, redoc_url=None, responses=answers)
    app.state.service = GenerationService(config, supervisor, folder)
    install(app)
    for routes in (model_routes(), image_routes(), video_routes(), request_routes(), state_routes(), page_routes()):
        app.include_router(routes)
    host = config.serve.host
    loopback = is_local(f"[{host}]" if ":" in host else host)
    app.add_middleware(Guard, max_bytes=1024 * config.serve.max_body_kib, loopback=loopback)
    return app


def state_routes() -> APIRouter:
    """How the server is."""
    router = APIRouter(tags=["state"])

    @router.get("/health")
    async def health(desk: TheDesk) -> openai.Health:
        """200 while the process lives, whatever its ranks do."""
        return health_of(desk)

    @router.get("/ready")
    async def ready(desk: TheDesk) -> openai.Health:
        """200 only while ranks are warm; else 503, with the reason."""
        if desk.supervisor.state != "ready":
            raise Problem("not_serving", f"{desk.supervisor.state}: {desk.supervisor.reason}", retry_after_s=1.0)
        return health_of(desk)

    @router.get("/metrics", response_class=Response)
    async def metrics(desk: TheDesk) -> Response:
        """Prometheus' text."""
        return Response(desk.meter.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def health_of(desk: GenerationService) -> openai.Health:
    """The state of the server and its ranks."""
    engine, states = desk.supervisor, [order.status for order in desk.orders()]
    return openai.Health(
        state=engine.state,
        reason=engine.reason,
        model=desk.config.model.name,
        ranks=0 if engine.info is None else engine.info.world_size,
        queued=states.count("queued"),
        running=states.count("running"),
        restarts=engine.restarts,
    )


def page_routes() -> APIRouter:
    """The built-in page, which needs nothing from elsewhere."""
    router, files = APIRouter(include_in_schema=False), importlib.resources.files(__package__)

    def serve(name: str, kind: str) -> None:
        text = files.joinpath(name or "page.html").read_text()

        @router.get(f"/{name}")
        async def page() -> Response:
            headers = {
                "content-security-policy": POLICY,
                "x-content-type-options": "nosniff",
                "cache-control": "no-cache",
            }
            return Response(text, media_type=f"{kind}; charset=utf-8", headers=headers)

    for name, kind in PAGE.items():
        serve(name, kind)
    return router
