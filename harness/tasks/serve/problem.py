"""Answers without a picture: a status, a code and a line on what to change, in the shape of OpenAI's errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from harness.messages import Failure

MAX_MESSAGE_CHARS = 500
STATUS: Mapping[str, int] = MappingProxyType(
    {
        "rejected": 400,
        "unsupported": 400,
        "forbidden": 403,
        "not_found": 404,
        "model_not_found": 404,
        "method_not_allowed": 405,
        "expired": 408,  # not 504: the deadline is the client's to choose, and 5xx are faults of the server alone
        "cancelled": 409,
        "not_done": 409,
        "too_large": 413,
        "busy": 429,
        "internal": 500,
        "failed": 503,
        "not_serving": 503,
        "oom": 507,
        "not_saved": 507,
    }
)
AGAIN = ("busy", "not_serving", "not_done")  # the same request may do better later; the others, sent again, do not


class ErrorDetail(BaseModel):
    """What went wrong: `code` is a key of STATUS, `param` the field that is to change."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every answer of 4xx and 5xx."""

    error: ErrorDetail


class Problem(Exception):
    """Ends a request with an answer of 4xx or 5xx.

    Args:
        code: a key of STATUS.
        message: one line, which says what to change.
        param: the field that is to change.
        retry_after_s: when to come again.
    """

    def __init__(self, code: str, message: str, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = " ".join(message.encode(errors="replace").decode().split())[:MAX_MESSAGE_CHARS]
        self.param = None if param is None else param.encode(errors="replace").decode()[:MAX_MESSAGE_CHARS]
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, failure: Failure) -> Problem:
        """What a client is told of an engine's typed answer; a rank that died is back within seconds."""
        where = "" if failure.rank is None else f"rank {failure.rank}: "
        again_s = 1.0 if failure.kind == "failed" and failure.retry_after_s is None else failure.retry_after_s
        code = failure.kind if failure.kind in STATUS else "failed"
        return cls(code, f"{where}{failure.message}", retry_after_s=again_s)

    def body(self) -> ErrorBody:
        """What the client reads."""
        status = STATUS[self.code]
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        return ErrorBody(error=ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code))

    def response(self) -> JSONResponse:
        """The whole answer. OpenAI's clients send again what had 408, 409, 429 or 5xx, unless they are told not to."""
        headers = {"x-should-retry": str(self.code in AGAIN).lower()}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return JSONResponse(self.body().model_dump(), STATUS[self.code], headers)


def install(app: FastAPI) -> None:
    """Gives every error of an application this shape."""

    async def told(request: Request, error: Exception) -> JSONResponse:
        return as_problem(error).response()

    for kind in (Problem, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, told)


def as_problem(error: Exception) -> Problem:
    """What a client is told of an exception."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        if code is None:
            return Problem("rejected", "the body is no JSON that can be read; send a JSON object")
        return Problem(code, f"{error.detail}; /openapi.json lists what there is")
    return Problem("internal", f"the server failed ({type(error).__name__}); logs/server.log in its folder says where")


def _invalid(error: RequestValidationError) -> Problem:
    """The first of a body's errors, as `field: what it should be`."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    if first["type"] == "json_invalid":
        return Problem("rejected", f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if not field and first["type"] != "string_unicode":
        return Problem("rejected", "the body must be a JSON object, with Content-Type: application/json")
    said = "there is no such field; leave it out" if first["type"] == "extra_forbidden" else first["msg"]
    return Problem("rejected", f"{field or 'a key'}: {said.removeprefix('Value error, ')}", field or None)
