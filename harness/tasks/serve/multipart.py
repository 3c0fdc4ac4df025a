"""Convert a multipart/form-data body (RFC 7578), which OpenAI's clients send for videos, to the equivalent JSON."""

from __future__ import annotations

import json
import math
import re
from typing import TypeAlias

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header

from harness.tasks.serve.problem import Problem

FIELD = re.compile(r"(\w{1,64})(?:\[(\w{1,64})\])?", re.ASCII)
MAX_FIELDS = 64
FormFields: TypeAlias = dict[str, "str | dict[str, str]"]


def multipart_boundary(content_type: str) -> bytes | None:
    """Read the boundary from a Content-Type header.

    Args:
        content_type: The value of the header.

    Returns:
        The boundary, empty if the header has none; None if the header does not declare a form.
    """
    kind, parameters = parse_options_header(content_type)
    return parameters.get(b"boundary", b"") if kind == b"multipart/form-data" else None


def form_to_json(body: bytes, boundary: bytes) -> bytes:
    """Convert a form to a JSON object; a field `name[key]` becomes a key of a nested object.

    Args:
        body: The body of the HTTP request.
        boundary: The boundary between the parts of the form.

    Returns:
        The JSON object as bytes; all its values are strings or objects of strings.

    Raises:
        Problem: The body is not a form, or contains a file.
    """
    if not boundary:
        raise Problem("rejected", "Content-Type has no boundary; send a form with one, or JSON with application/json")
    fields: FormFields = {}
    ends: list[bool] = []
    try:
        parser = FormParser(
            "multipart/form-data",
            lambda field: _add_field(fields, field),
            _refuse_file,
            lambda: ends.append(True),
            boundary=boundary,
            config={"MAX_MEMORY_FILE_SIZE": math.inf, "UPLOAD_ERROR_ON_BAD_CTE": True},  # the body is bounded
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Problem("rejected", f"the body is not a form ({error}); send a form, or application/json") from error
    if not ends:
        raise Problem("rejected", "the form has no last boundary; send the whole form")
    return json.dumps(fields).encode()


def _refuse_file(file: File) -> None:
    name = (file.field_name or b"a part").decode(errors="replace")
    raise Problem("rejected", f"{name} is a file, and files are not read; leave it out", name)


def _add_field(fields: FormFields, field: Field) -> None:
    name = (field.field_name or b"").decode(errors="replace")
    path = FIELD.fullmatch(name)
    if path is None or len(fields) > MAX_FIELDS:
        raise Problem("rejected", f"{name}: there is no such field; leave it out", name)
    try:
        text = (field.value or b"").decode()
    except UnicodeDecodeError:
        raise Problem("rejected", f"{name} is not UTF-8; send UTF-8 text", name) from None
    inner = fields if path[2] is None else fields.setdefault(path[1], {})
    key = path[2] or path[1]
    if isinstance(inner, str) or key in inner:
        raise Problem("rejected", f"{name} is given twice; give it once", name)
    inner[key] = text
