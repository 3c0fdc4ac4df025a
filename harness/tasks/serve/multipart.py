"""A form of multipart/form-data (RFC 7578) as the JSON object that it stands for, as OpenAI's clients send videos."""

from __future__ import annotations

import json
import re
from email.message import Message
from typing import TypeAlias

from harness.tasks.serve.problem import Problem

NAME = re.compile(rb'content-disposition:\s*form-data;(?:.*;)?\s*name="([^"\r\n]*)"([^\r\n]*)', re.IGNORECASE)
FIELD = re.compile(r"(\w+)(?:\[(\w+)\])?")
Fields: TypeAlias = dict[str, "str | dict[str, str]"]


def multipart_boundary(content_type: str) -> bytes | None:
    """The boundary that a Content-Type header states; None where it states no form."""
    header = Message()
    header["content-type"] = content_type
    if header.get_content_type() != "multipart/form-data":
        return None
    return str(header.get_boundary("")).encode()


def form_to_json(body: bytes, boundary: bytes) -> bytes:
    """The object of a form; `name[key]` is a key of an object of its own.

    Args:
        body: of the request.
        boundary: between its parts.

    Raises:
        Problem: it is no form, or holds a file.
    """
    if not boundary:
        raise Problem("rejected", "Content-Type names no boundary; send a form, or JSON with application/json")
    fields: Fields = {}
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary)[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        _put(fields, head, value)
    return json.dumps(fields).encode()


def _put(fields: Fields, head: bytes, value: bytes) -> None:
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
        raise Problem("rejected", f"{name} is not UTF-8", name) from None
    if path[2] is None:
        fields[path[1]] = text
        return
    inner = fields.setdefault(path[1], {})
    if isinstance(inner, str):
        raise Problem("rejected", f"{path[1]} is given both as a text and as an object", path[1])
    inner[path[2]] = text
