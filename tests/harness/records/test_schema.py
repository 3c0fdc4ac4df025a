"""The JSON schema of a record is the one in the repository, says what keys mean, and refuses what is no record."""

import json
from typing import Any

import jsonschema
import msgspec
import pytest

from harness.records.schema import FILE, record_schema, text
from tests.fixtures.records import record


def test_the_file_is_current() -> None:
    assert FILE.read_text() == text(), "run python -m harness.records.schema"


def plain() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(msgspec.json.encode(record()))
    return found


def test_a_record_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(record_schema())
    jsonschema.validate(plain(), record_schema())


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("schema",), 1),
        (("summary", "latency_ms", "median"), "10 ms"),
        (("summary", "latency_ms", "range"), [1.0]),
        (("repeats", 0, "steps", 0, "duration_ms"), None),
        (("samples", 0, "seed"), 0.5),
        (("provenance", "world_size"), "1"),
    ],
)
def test_what_is_no_record_is_refused(place: tuple[str | int, ...], value: object) -> None:
    content = plain()
    part: Any = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, record_schema())


def test_every_described_attribute_is_in_the_schema_with_its_meaning() -> None:
    definitions = record_schema()["$defs"]
    latency = definitions["Statistics"]["properties"]["latency_ms"]
    assert latency["description"] == "Time of a request, ms."
    stage = definitions["Statistics"]["properties"]["stage_ms"]["description"]
    assert stage.endswith("sum to its latency.")  # of three lines
    assert definitions["Record"]["description"] == "`record.json`: one run."
    assert all("description" in key for key in definitions["Record"]["properties"].values())
