"""A trace: a file of arrivals to replay, JSON lines or CSV, read and checked before a process starts.

| name | meaning |
|---|---|
| `time_s` or `time_ms` | time of arrival; it counts from the earliest one |
| `prompt`, `negative_prompt`, `seed` | of this request, in place of the run's |
| `steps` or `num_inference_steps` | solver steps |
| `height` and `width`, or `size` as `512x768` (width first) | pixels |
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from harness.config.bounds import MAX_SEED, MAX_SIDE, MAX_STEPS

NAMES = (
    *("time_s", "time_ms", "prompt", "negative_prompt", "seed", "steps", "num_inference_steps", "height", "width"),
    "size",
)


@dataclass(frozen=True)
class TracedRequest:
    """One arrival; what is None is the run's.

    Attributes:
        time_s: Time of arrival since the first one, s.
        prompt: The prompt.
        negative_prompt: The negative prompt.
        seed: Seed of the first image.
        steps: Solver steps.
        height: Height in pixels.
        width: Width in pixels.
        line: Number of the line in the file, from 1.
    """

    time_s: float
    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    line: int = 0


def read_trace(file: str) -> list[TracedRequest]:
    """Read the arrivals of a file.

    Args:
        file: The file.

    Returns:
        The arrivals in the order of time; the first one is at 0.

    Raises:
        ValueError: The file cannot be used; one line has the number of the line and says what to change.
    """
    path = Path(file).expanduser()
    readers = {".jsonl": read_jsonl, ".csv": read_csv}
    if path.suffix not in readers:
        raise ValueError(f"load.trace={file} does not end in .jsonl or .csv; save it as one of them")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"load.trace={file} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"load.trace={file} is not UTF-8; save it as UTF-8") from error
    found, number = [], 1
    try:
        for number, fields in readers[path.suffix](text):
            found.append(replace(parse_arrival(fields), line=number))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"load.trace={file}: line {number}: {error}") from error
    if not found:
        raise ValueError(f"load.trace={file} has no arrivals; give one a line")
    first = min(request.time_s for request in found)
    return sorted((replace(each, time_s=each.time_s - first) for each in found), key=lambda each: each.time_s)


def trace_sha256(file: str) -> str:
    """Return the hash of a trace's bytes."""
    return hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()


def read_jsonl(text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield the number and the fields of each line that is not empty."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, msgspec.json.decode(line, type=dict[str, object])
            except msgspec.DecodeError:
                yield number, {"": line}


def read_csv(text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Yield the number and the fields of each row below the header; empty cells are left out."""
    rows = csv.DictReader(text.splitlines())
    for row in rows:
        yield rows.line_num, {str(name).strip(): value for name, value in row.items() if value not in (None, "")}


def parse_arrival(fields: Mapping[str, object]) -> TracedRequest:
    """Return one arrival.

    Args:
        fields: The fields by name; numbers may be texts, as in CSV.

    Returns:
        The arrival.

    Raises:
        ValueError: A field is unknown, missing or wrong.
    """
    if "" in fields:
        raise ValueError('not a JSON object; give one such as {"time_s": 0.5}')
    if unknown := [name for name in fields if name not in NAMES]:
        hint = "; give time_s or time_ms" if unknown[0] in ("timestamp", "time") else ""
        raise ValueError(f"unknown field {unknown[0]!r}{hint} (there are {', '.join(NAMES)})")
    if ("time_s" in fields) == ("time_ms" in fields):
        raise ValueError("give time_s or time_ms, and one of them only")
    time_s = number_of(fields, "time_s") if "time_s" in fields else number_of(fields, "time_ms") / 1e3
    if "steps" in fields and "num_inference_steps" in fields:
        raise ValueError("give steps or num_inference_steps, not both")
    height, width = parse_size(fields)
    return TracedRequest(
        time_s,
        prompt=text_of(fields, "prompt"),
        negative_prompt=text_of(fields, "negative_prompt"),
        seed=integer_of(fields, "seed", 0, MAX_SEED),
        steps=integer_of(fields, "num_inference_steps" if "num_inference_steps" in fields else "steps", 1, MAX_STEPS),
        height=height,
        width=width,
    )


def parse_size(fields: Mapping[str, object]) -> tuple[int | None, int | None]:
    """Return the height and the width, both None if there are none.

    Args:
        fields: The fields by name.

    Raises:
        ValueError: The size is wrong, or only a part of it is there.
    """
    size, apart = fields.get("size"), ("height" in fields, "width" in fields)
    if size is None:
        if any(apart) and not all(apart):
            raise ValueError("give both height and width")
        return integer_of(fields, "height", 1, MAX_SIDE), integer_of(fields, "width", 1, MAX_SIDE)
    if any(apart):
        raise ValueError("give size, or height and width, not both")
    sides = dict(zip(("width", "height"), str(size).lower().split("x"), strict=False))
    if len(str(size).lower().split("x")) != 2:
        raise ValueError(f"size={size}; write it as 512x768, width first")
    return integer_of(sides, "height", 1, MAX_SIDE), integer_of(sides, "width", 1, MAX_SIDE)


def text_of(fields: Mapping[str, object], name: str) -> str | None:
    """Return a field that is a text, or None if it is missing.

    Args:
        fields: The fields by name.
        name: The name of the field.

    Raises:
        ValueError: It is no text.
    """
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}={value}; give a text")
    return value


def number_of(fields: Mapping[str, object], name: str) -> float:
    """Return a field that is a finite number.

    Args:
        fields: The fields by name.
        name: The name of the field, which is there.

    Raises:
        ValueError: It is no such number.
    """
    value = fields[name]
    try:
        number = math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}={value}; give a number")
    return number


def integer_of(fields: Mapping[str, object], name: str, low: int, high: int) -> int | None:
    """Return a field that is a whole number in a range, or None if it is missing.

    Args:
        fields: The fields by name.
        name: The name of the field.
        low: The smallest allowed number.
        high: The largest allowed number.

    Raises:
        ValueError: It is no such number.
    """
    if name not in fields:
        return None
    value = fields[name]
    number = value if isinstance(value, int) and not isinstance(value, bool) else number_of(fields, name)
    if number != int(number) or not low <= number <= high:
        raise ValueError(f"{name}={fields[name]}; give a whole number from {low} to {high}")
    return int(number)
