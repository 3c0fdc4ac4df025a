"""The JSON schema of `record.json`, generated from the record's structs and their docstrings.

`python -m harness.records.schema` writes it to `record.schema.json` beside this file.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from harness.records.record import SCHEMA, Record

FILE = Path(__file__).with_name("record.schema.json")
DIALECT = "https://json-schema.org/draft/2020-12/schema"
ATTRIBUTE = re.compile(r"^(\w+): (.*(?:\n {4,}.*)*)", re.MULTILINE)


def record_schema() -> dict[str, Any]:
    """Return the JSON schema of a record."""
    schema = msgspec.json.schema(Record)
    structs = {kind.__name__: kind for kind in _structs(Record, set())}
    for name, kind in structs.items():
        definition = schema["$defs"][name]
        summary, attributes = parse_docstring(kind)
        definition["description"] = summary
        for key, meaning in attributes.items():
            definition["properties"][key]["description"] = meaning
    schema["$defs"][Record.__name__]["properties"]["schema"]["const"] = SCHEMA
    return {"$schema": DIALECT, "title": f"record.json of Triptych, schema {SCHEMA}", **schema}


def parse_docstring(kind: type[msgspec.Struct]) -> tuple[str, dict[str, str]]:
    """Return what the docstring of a struct says of it, and of its fields by name."""
    text, _, attributes = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    found = {
        name: _one_line(meaning)
        for name, meaning in ATTRIBUTE.findall(inspect.cleandoc(attributes))
        if name in kind.__struct_fields__
    }
    return _one_line(text), found


def _structs(kind: Any, known: set[type]) -> Iterator[type[msgspec.Struct]]:
    """Yield a struct and all structs in its fields."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind not in known:
        known.add(kind)
        yield kind
        for field in get_type_hints(kind).values():
            yield from _structs(field, known)
    for part in getattr(kind, "__args__", ()):
        yield from _structs(part, known)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def text() -> str:
    """Return the content of the file."""
    return json.dumps(record_schema(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
    print(FILE)
