"""The bounds of what a client sends: the document shows them, the check holds them. How errors are answered."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.config.bounds import MAX_GUIDANCE, MAX_SEED, MAX_SIDE
from harness.config.schema import RunConfig
from harness.messages import Failure
from harness.resolve.compose import compose_run
from harness.resolve.limits import MAX_PROMPT_CHARS
from harness.tasks.serve.app import make_app
from harness.tasks.serve.bounds import SCHEMAS, number_bounds
from harness.tasks.serve.openai import GenerationOptions, ImageRequest, JobRequest, ParsedRequest, VideoRequest
from harness.tasks.serve.parse import to_request, video_frames
from harness.tasks.serve.problem import STATUS, Problem, retry_headers
from tests.fixtures.serving.fake_supervisor import FakeSupervisor

OF_VIDEOS: dict[str, dict[str, int]] = {
    "seconds": {},
    "num_frames": {},
    "fps": {"num_frames": 5},
    "width": {"num_frames": 5, "height": 64},
    "height": {"num_frames": 5, "width": 64},
}
"""The numbers of videos alone, and what they need beside them."""
BODIES = (ImageRequest, JobRequest, VideoRequest, GenerationOptions)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    found = compose_run(["task=serve", "serve.max_steps=60", "serve.max_images=3", "serve.timeout_s=90"]).config
    return replace(found, model=replace(found.model, max_frames=17, frame_multiple=4, fps=8))


@pytest.fixture(scope="module")
def schemas(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = make_app(config, FakeSupervisor(config), Path()).openapi()["components"]["schemas"]  # type: ignore[arg-type]
    return found


def kinds(declared: dict[str, Any]) -> list[dict[str, Any]]:
    return [kind for kind in declared.get("anyOf", [declared]) if kind.get("type") != "null"]


def test_everything_that_a_client_sends_is_bounded_in_the_document(schemas: dict[str, Any]) -> None:
    for body in BODIES:
        for name, declared in schemas[body.__name__]["properties"].items():
            for kind in kinds(declared):
                if kind.get("type") in ("integer", "number"):
                    assert "maximum" in kind, (body, name)
                    assert {"minimum", "exclusiveMinimum"} & kind.keys(), (body, name)
                elif kind.get("type") == "string":
                    assert {"maxLength", "enum", "const"} & kind.keys(), (body, name)
                else:
                    assert {"$ref", "const"} & kind.keys() or kind == {"type": "boolean"}, (body, name)


def test_the_bounds_are_the_servers(schemas: dict[str, Any]) -> None:
    options = {name: kinds(declared)[0] for name, declared in schemas["GenerationOptions"]["properties"].items()}
    assert (options["steps"]["minimum"], options["steps"]["maximum"]) == (1, 60)
    assert options["seed"]["maximum"] == MAX_SEED
    assert options["guidance"]["maximum"] == MAX_GUIDANCE
    assert (options["timeout_s"]["exclusiveMinimum"], options["timeout_s"]["maximum"]) == (0, 90)
    assert options["frames"]["maximum"] == 17
    assert options["negative_prompt"]["maxLength"] == MAX_PROMPT_CHARS
    assert kinds(schemas["ImageRequest"]["properties"]["n"])[0]["maximum"] == 3
    assert kinds(schemas["VideoRequest"]["properties"]["seconds"])[0]["maximum"] == 17 / 8


def body_with(path: str, value: float) -> tuple[ParsedRequest, int | None]:
    """Return a body with one number, and its images."""
    group, _, name = path.rpartition(".")
    kind = VideoRequest if path in ("triptych.frames", *OF_VIDEOS) else JobRequest if group else ImageRequest
    given: dict[str, Any] = OF_VIDEOS.get(path, {}) | ({"triptych": {name: value}} if group else {name: value})
    body = kind.model_validate({"prompt": "x"} | given)
    return body, body.n if isinstance(body, JobRequest) else None


def accept(path: str, value: float, config: RunConfig) -> None:
    body, n = body_with(path, value)
    frames = video_frames(body, config) if isinstance(body, VideoRequest) else 1
    to_request(body, 1 if n is None else n, frames, config)


def test_each_bound_is_held_at_both_ends(config: RunConfig) -> None:
    bounds = number_bounds(config)
    assert {path.partition(".")[0] for path in bounds} == set(SCHEMAS)
    for path, bound in bounds.items():
        if path in ("width", "height"):
            inside, outside = [8, 64], [0, -8, MAX_SIDE + 1]
        elif path == "fps":
            inside, outside = [int(bound.low)], [int(bound.low) - 1, int(bound.low) + 1]
        elif path in ("triptych.frames", "num_frames"):
            inside, outside = [5, 17], [0, -3, 21, 10**30]
        elif path in ("seconds", "triptych.timeout_s"):
            inside, outside = [bound.high / 100, bound.high], [0, -1e-9, bound.high * 1.001, 1e300]
        elif path in ("triptych.guidance", "guidance_scale", "true_cfg_scale"):
            inside, outside = [0, 1e-30, MAX_GUIDANCE], [-1e-9, MAX_GUIDANCE + 1e-9, 1e30]
        else:
            inside, outside = [int(bound.low), int(bound.high)], [int(bound.low) - 1, int(bound.high) + 1, 10**40]
        for value in inside:
            accept(path, value, config)
        for value in outside:
            with pytest.raises(Problem, match=path.rpartition(".")[2]) as raised:
                accept(path, value, config)
            assert raised.value.code == "rejected"


def test_endless_timeouts_of_a_server_do_not_unbound_its_document(config: RunConfig) -> None:
    endless = replace(config, serve=replace(config.serve, timeout_s=math.inf))
    assert math.isfinite(number_bounds(endless)["triptych.timeout_s"].high)


@pytest.mark.parametrize("retry_after_s", [None, 0.0, 0.2, 1.0, 59.4, 1e9])
def test_the_headers_about_trying_again_agree(retry_after_s: float | None) -> None:
    headers = retry_headers(retry_after_s)
    assert ("retry-after" in headers) == (headers["x-should-retry"] == "true") == (retry_after_s is not None)
    assert 1 <= int(headers.get("retry-after", 1)) <= 3600


def test_every_error_says_the_same_in_all_its_headers() -> None:
    for code in STATUS:
        for retry_after_s in (None, 7.0):
            headers = Problem(code, "planted", retry_after_s=retry_after_s).response().headers
            passes = retry_after_s is not None or code in ("busy", "not_done")
            assert headers["x-should-retry"] == str(passes).lower()
            assert ("retry-after" in headers) == passes
            assert ("www-authenticate" in headers) == (code == "unauthorized")


def test_a_failure_of_the_ranks_says_itself_whether_it_passes() -> None:
    assert Problem.from_failure(Failure("x", "failed", "planted")).retry_after_s is None
    assert Problem.from_failure(Failure("x", "failed", "planted", retry_after_s=3.0)).retry_after_s == 3.0
    assert Problem.from_failure(Failure("x", "busy", "planted")).retry_after_s == 1.0
    assert Problem.from_failure(Failure("x", "no such kind", "planted")).code == "failed"
