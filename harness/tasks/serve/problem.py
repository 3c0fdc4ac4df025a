"""Error answers: a status, a code and one line that says what to change, in the form of OpenAI's errors."""

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
        "expired": 408,  # not 504: the client chooses the deadline, and 5xx are faults of the server only
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
RETRYABLE = ("busy", "not_serving", "not_done")  # the same request may succeed later; with other codes it will not


class ErrorDetail(BaseModel):
    """The error itself.

    Attributes:
        message: One line that says what to change.
        type: The type of the error in OpenAI's API.
        param: The field to change, if it is one field.
        code: A key of STATUS.
    """

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every answer with status 4xx or 5xx."""

    error: ErrorDetail


class Problem(Exception):
    """An exception that ends a request with an answer of status 4xx or 5xx.

    Args:
        code: A key of STATUS.
        message: One line that says what to change.
        param: The field to change, if it is one field.
        retry_after_s: The time after which the client may try again, seconds.
    """

    def __init__(self, code: str, message: str, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = " ".join(message.encode(errors="replace").decode().split())[:MAX_MESSAGE_CHARS]
        self.param = None if param is None else param.encode(errors="replace").decode()[:MAX_MESSAGE_CHARS]
        self.retry_after_s = retry_after_s

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

    def body(self) -> ErrorBody:
        """Return the JSON body of the answer."""
        status = STATUS[self.code]
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        return ErrorBody(error=ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code))

    def response(self) -> JSONResponse:
        """Return the whole answer.

        OpenAI's clients retry after 408, 409, 429 and 5xx, unless the header x-should-retry says false.
        """
        headers = {"x-should-retry": str(self.code in RETRYABLE).lower()}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return JSONResponse(self.body().model_dump(), STATUS[self.code], headers)


def install_error_handlers(app: FastAPI) -> None:
    """Make an application answer every exception in the form of OpenAI's errors."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return as_problem(error).response()

    for kind in (Problem, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


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
    return Problem("rejected", f"{field or 'a key'}: {message.removeprefix('Value error, ')}", field or None)
