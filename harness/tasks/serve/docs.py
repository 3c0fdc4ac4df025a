"""The page /docs: the routes and the fields of the OpenAPI document as plain HTML, without scripts and other sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

METHODS = ("get", "post", "delete")
REFERENCE = "#/components/schemas/"
BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "maxLength")


def docs_page(document: Mapping[str, Any]) -> str:
    """Return the page of an OpenAPI document.

    Args:
        document: The document, with the bounds of its server.
    """
    schemas: Mapping[str, Mapping[str, Any]] = document["components"]["schemas"]
    title = f"{document['info']['title']} {document['info']['version']}"
    routes = [
        (method, path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if method in METHODS
    ]
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>{escape(title)}: routes</title>\n<link rel="icon" href="data:,">',
        '<link rel="stylesheet" href="/page.css">\n<link rel="stylesheet" href="/docs.css">',
        '</head>\n<body>\n<article role="main">',
        f'<h1>{escape(title)}</h1>\n<p><a href="/openapi.json">openapi.json</a></p>\n<h2>Routes</h2>',
        _table(("route", "does", "body"), (_route(*route) for route in routes)),
        *(_schema(name, schema) for name, schema in schemas.items()),
        "</article>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _route(method: str, path: str, operation: Mapping[str, Any]) -> tuple[str, str, str]:
    content = operation.get("requestBody", {}).get("content", {})
    bodies = dict.fromkeys(_kind(media["schema"]) for media in content.values())
    description = operation.get("description", operation.get("summary", ""))
    return f"<code>{method.upper()} {escape(path)}</code>", escape(description), ", ".join(bodies)


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    """Return the section of a schema: its description and a table of its fields."""
    about, _, attributes = schema.get("description", "").partition("Attributes:")
    meanings = dict(_meanings(attributes))
    required = schema.get("required", ())
    rows = [
        (
            f"<code>{escape(field)}</code>" + (" (required)" if field in required else ""),
            _kind(declared),
            escape(meanings.get(field, "")),
        )
        for field, declared in schema.get("properties", {}).items()
    ]
    table = _table(("field", "is", "means"), rows)
    return f'<h2 id="{escape(name)}">{escape(name)}</h2>\n<p>{escape(" ".join(about.split()))}</p>\n{table}'


def _meanings(attributes: str) -> Iterator[tuple[str, str]]:
    """Yield each field of a docstring's section "Attributes", with what it means."""
    name, text = "", ""
    for line in attributes.splitlines():
        first, colon, rest = line.strip().partition(": ")
        if colon and first.isidentifier():
            yield name, text
            name, text = first, rest
        else:
            text = f"{text} {line.strip()}".strip()
    yield name, text


def _kind(declared: Mapping[str, Any]) -> str:
    """Return what a field is, in words: its type, its values and its bounds."""
    if "$ref" in declared:
        name = escape(declared["$ref"].removeprefix(REFERENCE))
        return f'<a href="#{name}">{name}</a>'
    if kinds := declared.get("anyOf"):
        return " or ".join(_kind(kind) for kind in kinds if kind.get("type") != "null")
    if "const" in declared or "enum" in declared:
        return escape(", ".join(str(value) for value in declared.get("enum", [declared.get("const")])))
    if "items" in declared:
        return f"list of {_kind(declared['items'])}"
    bounds = ", ".join(f"{name} {declared[name]}" for name in BOUNDS if name in declared)
    return escape(declared.get("type", "any") + (f" ({bounds})" if bounds else ""))


def _table(head: Sequence[str], rows: Iterator[tuple[str, str, str]] | Sequence[tuple[str, str, str]]) -> str:
    """Return a table of cells that are HTML."""
    titles = "".join(f"<th>{name}</th>" for name in head)
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table>\n<tr>{titles}</tr>\n" + "\n".join(lines) + "\n</table>"
