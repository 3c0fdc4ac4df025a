"""Error answers: a status, a code and one line that says what to change, in the form of OpenAI's errors."""

from __future__ import annotations

import logging
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
log = logging.getLogger(__name__)
STATUS: Mapping[str, int] = MappingProxyType(
    {
        "rejected": 400,
        "unsupported": 400,
        "unauthorized": 401,
        "forbidden": 403,
        "not_found": 404,
        "model_not_found": 404,
        "method_not_allowed": 405,
        "expired": 408,  # not 504: the client chooses the deadline, and 5xx are faults of the server only
        "cancelled": 409,
        "not_done": 409,
        "too_large": 413,
        "no_such_range": 416,
        "busy": 429,
        "head_too_large": 431,
        "internal": 500,
        "failed": 503,
        "not_serving": 503,
        "oom": 507,
        "not_saved": 507,
    }
)
PASSING = ("busy", "not_done")  # these pass by themselves, so a client may always try again
HTTP_ID = "x-request-id"
RETRY_S = 1.0
MAX_RETRY_S = 3600.0


class ErrorDetail(BaseModel):
    """The error itself.

    Attributes:
        message: One line that says what to change.
        type: The type of the error in OpenAI's API.
        param: The field to change, if it is one field.
        code: A key of STATUS.
        request_id: The id of the HTTP request, as in the header x-request-id.
    """

    message: str
    type: str
    param: str | None
    code: str
    request_id: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer with status 4xx or 5xx."""

    error: ErrorDetail


class Problem(Exception):
    """An exception that ends a request with an answer of status 4xx or 5xx.

    Args:
        code: A key of STATUS.
        message: One line that says what to change.
        param: The field to change, if it is one field.
        retry_after_s: The time after which the client may try again, seconds; None if the cause does not pass.
    """

    def __init__(self, code: str, message: str, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = " ".join(message.encode(errors="replace").decode().split())[:MAX_MESSAGE_CHARS]
        self.param = None if param is None else param.encode(errors="replace").decode()[:MAX_MESSAGE_CHARS]
        self.retry_after_s = RETRY_S if retry_after_s is None and code in PASSING else retry_after_s

    @classmethod
    def from_failure(cls, failure: Failure) -> Problem:
        """Convert an engine's failure.

        Args:
            failure: The engine's typed answer.

        Returns:
            The error for the client.
        """
        where = "" if failure.rank is None else f"rank {failure.rank}: "
        code = failure.kind if failure.kind in STATUS else "failed"
        return cls(code, f"{where}{failure.message}", retry_after_s=failure.retry_after_s)

    def body(self, http_id: str | None = None) -> ErrorBody:
        """Return the JSON body of the answer.

        Args:
            http_id: The id of the HTTP request.
        """
        status = STATUS[self.code]
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        return ErrorBody(
            error=ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code, request_id=http_id)
        )

    def response(self, http_id: str | None = None, close: bool = False) -> JSONResponse:
        """Return the whole answer.

        Args:
            http_id: The id of the HTTP request.
            close: Whether the connection is closed after it, with a part of the request unread.
        """
        headers = retry_headers(self.retry_after_s)
        if self.code == "unauthorized":
            headers["www-authenticate"] = "Bearer"
        if close:
            headers["connection"] = "close"
        if http_id is not None:
            headers[HTTP_ID] = http_id
        return JSONResponse(self.body(http_id).model_dump(), STATUS[self.code], headers)


def retry_headers(retry_after_s: float | None) -> dict[str, str]:
    """Return the headers that say whether and when the same request may succeed.

    OpenAI's clients retry after 408, 409, 429 and 5xx, unless the header x-should-retry says false.

    Args:
        retry_after_s: The time after which the client may try again, seconds; None if the cause does not pass.

    Returns:
        `x-should-retry`, and `retry-after` in whole seconds if it is true.
    """
    if retry_after_s is None:
        return {"x-should-retry": "false"}
    return {"x-should-retry": "true", "retry-after": str(math.ceil(min(max(RETRY_S, retry_after_s), MAX_RETRY_S)))}


def install_error_handlers(app: FastAPI) -> None:
    """Make an application answer every exception in the form of OpenAI's errors."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        problem = as_problem(error)
        if problem.code == "internal":
            log.error("the HTTP request %s ended with %s", http_id_of(request), type(error).__name__)
        return problem.response(http_id_of(request))

    for kind in (Problem, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


def http_id_of(request: Request) -> str:
    """Return the id of an HTTP request, as the middleware chose it."""
    http_id: str = request.state.http_id
    return http_id


def as_problem(error: Exception) -> Problem:
    """Convert any exception to the error for the client."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        return _from_validation_error(error)
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        if code is None:
            return Problem("rejected", "the body is not readable JSON; send a JSON object")
        return Problem(code, f"{error.detail}; /openapi.json lists all routes")
    return Problem("internal", f"the server failed ({type(error).__name__}); see logs/server.log in its run folder")


def _from_validation_error(error: RequestValidationError) -> Problem:
    """Return the first error of a body, as `field: what it should be`."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    if first["type"] == "json_invalid":
        return Problem("rejected", f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if not field and first["type"] != "string_unicode":
        return Problem("rejected", "the body must be a JSON object, with Content-Type: application/json")
    message = "there is no such field; leave it out" if first["type"] == "extra_forbidden" else first["msg"]
    if first["type"] == "string_too_long":
        message = f"{len(first['input'])} characters; shorten it to {first['ctx']['max_length']} or fewer"
    return Problem("rejected", f"{field or 'a key'}: {message.removeprefix('Value error, ')}", field or None)
