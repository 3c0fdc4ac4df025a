"""Convert a multipart/form-data body (RFC 7578), which OpenAI's clients send for videos, to the equivalent JSON."""

from __future__ import annotations

import json
import re
from email.message import Message
from typing import TypeAlias

from harness.tasks.serve.problem import Problem

NAME = re.compile(rb'content-disposition:\s*form-data;(?:.*;)?\s*name="([^"\r\n]*)"([^\r\n]*)', re.IGNORECASE)
FIELD = re.compile(r"(\w+)(?:\[(\w+)\])?")
FormFields: TypeAlias = dict[str, "str | dict[str, str]"]


def multipart_boundary(content_type: str) -> bytes | None:
    """Read the boundary from a Content-Type header.

    Args:
        content_type: The value of the header.

    Returns:
        The boundary, empty if the header has none; None if the header does not declare a form.
    """
    header = Message()
    header["content-type"] = content_type
    if header.get_content_type() != "multipart/form-data":
        return None
    return str(header.get_boundary("")).encode()


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
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary)[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        _add_field(fields, head, value)
    return json.dumps(fields).encode()


def _add_field(fields: FormFields, head: bytes, value: bytes) -> None:
    found = NAME.search(head)
    if found is None:
        raise Problem("rejected", 'a part of the form has no Content-Disposition: form-data; name="..."')
    name, rest = found[1].decode(errors="replace"), found[2]
    path = FIELD.fullmatch(name)
    if path is None or b"filename" in rest:
        raise Problem("rejected", f"{name}: there is no such field, and files are not read; leave it out", name)
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise Problem("rejected", f"{name} is not UTF-8; send UTF-8 text", name) from None
    if path[2] is None:
        fields[path[1]] = text
        return
    inner = fields.setdefault(path[1], {})
    if isinstance(inner, str):
        raise Problem("rejected", f"{path[1]} is given both as text and as an object; give one of them", path[1])
    inner[path[2]] = text
