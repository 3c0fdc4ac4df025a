"""Readers of prompt files: each takes the text of a file and returns its prompts, or says which line is broken.

| format | file | columns or keys |
|---|---|---|
| text | any | one prompt per line; blank lines are skipped |
| jsonl, csv, tsv | any | prompt, and optionally id, category, seed, negative_prompt, height and width, or size |
| parti_prompts | PartiPrompts.tsv | Prompt, Category |
| drawbench | drawbench.csv | Prompts, Category |
| geneval | evaluation_metadata.jsonl | prompt, tag |
| coco | captions_val2014.json | annotations: id, caption |
| vbench | VBench_full_info.json | prompt_en, dimension |
| mlperf_sdxl | captions_source.tsv | id, caption |
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from harness.config.bounds import MAX_SEED, MAX_SIDE
from harness.datasets.prompts import DatasetError, DatasetPrompt
from models.registry import did_you_mean

COLUMNS = (
    "prompt", "id", "category", "seed", "negative_prompt", "negative", "height", "width", "size", "images",
)  # fmt: skip
SUFFIXES = {".txt": "text", ".jsonl": "jsonl", ".csv": "csv", ".tsv": "tsv"}
MAX_FIELD = 1_000_000  # characters of one field of a table

Row = tuple[int, Mapping[str, Any]]
"""The number of a line, and its fields by lower-case name."""


def parse(text: str, form: str) -> list[DatasetPrompt]:
    """Return the prompts of a file.

    Args:
        text: Content of the file.
        form: Format, one of FORMATS but auto.

    Returns:
        The prompts in the order of the file.

    Raises:
        DatasetError: A line is broken, or there are no prompts.
    """
    prompts = list(READERS[form](text))
    if not prompts:
        raise DatasetError("has no prompts; give a file with at least one")
    return prompts


def read_text(text: str) -> Iterator[DatasetPrompt]:
    """Yield one prompt per line."""
    index = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if prompt := line.strip():
            yield DatasetPrompt(index, prompt, str(index), number)
            index += 1


def read_jsonl(text: str) -> Iterator[DatasetPrompt]:
    """Yield one prompt per JSON object."""
    for index, (line, fields) in enumerate(_json_lines(text)):
        yield own_prompt(index, line, fields)


def read_csv(text: str) -> Iterator[DatasetPrompt]:
    """Yield one prompt per row of a table with commas."""
    for index, (line, fields) in enumerate(_table(text, ",", ("prompt",))):
        yield own_prompt(index, line, fields)


def read_tsv(text: str) -> Iterator[DatasetPrompt]:
    """Yield one prompt per row of a table with tabs."""
    for index, (line, fields) in enumerate(_table(text, "\t", ("prompt",))):
        yield own_prompt(index, line, fields)


def read_parti_prompts(text: str) -> Iterator[DatasetPrompt]:
    """Yield the prompts of PartiPrompts.tsv (arXiv:2206.10789), by its column Category; it quotes nothing."""
    for index, (line, fields) in enumerate(_table(text, "\t", ("prompt", "category"), quoted=False)):
        yield _prompt(index, line, fields["prompt"], fields["category"])


def read_drawbench(text: str) -> Iterator[DatasetPrompt]:
    """Yield the prompts of DrawBench (arXiv:2205.11487), by its column Category."""
    for index, (line, fields) in enumerate(_table(text, ",", ("prompts", "category"))):
        yield _prompt(index, line, fields["prompts"], fields["category"])


def read_geneval(text: str) -> Iterator[DatasetPrompt]:
    """Yield the prompts of GenEval's evaluation_metadata.jsonl (arXiv:2310.11513), by tag."""
    for index, (line, fields) in enumerate(_json_lines(text)):
        yield _prompt(index, line, _required(line, fields, "prompt"), _required(line, fields, "tag"), f"{index:05d}")


def read_coco(text: str) -> Iterator[DatasetPrompt]:
    """Yield every caption of COCO's captions_*.json (arXiv:1504.00325); an image has about five."""
    content = _json(text)
    entries = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise DatasetError("is no file of COCO captions: it has no list `annotations`")
    for index, (line, fields) in enumerate(_entries(entries)):
        yield _prompt(index, line, _required(line, fields, "caption"), None, _required(line, fields, "id"))


def read_vbench(text: str) -> Iterator[DatasetPrompt]:
    """Yield the prompts of VBench_full_info.json (arXiv:2311.17982), each in all of its dimensions."""
    content = _json(text)
    if not isinstance(content, list):
        raise DatasetError("is no VBench_full_info.json: it is no list")
    for index, (line, fields) in enumerate(_entries(content)):
        dimensions = _required(line, fields, "dimension")
        if not isinstance(dimensions, list) or not all(isinstance(name, str) for name in dimensions):
            raise DatasetError(f"entry {line}: `dimension` is no list of names")
        made = _prompt(index, line, _required(line, fields, "prompt_en"), None)
        yield DatasetPrompt(index, made.prompt, made.id, line, tuple(dimensions))


def read_mlperf_sdxl(text: str) -> Iterator[DatasetPrompt]:
    """Yield the captions of MLPerf's text to image; its height and width are those of COCO's images, and unused."""
    for index, (line, fields) in enumerate(_table(text, "\t", ("id", "caption"))):
        yield _prompt(index, line, fields["caption"], None, fields["id"])


READERS: dict[str, Callable[[str], Iterator[DatasetPrompt]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "tsv": read_tsv,
    "parti_prompts": read_parti_prompts,
    "drawbench": read_drawbench,
    "geneval": read_geneval,
    "coco": read_coco,
    "vbench": read_vbench,
    "mlperf_sdxl": read_mlperf_sdxl,
}


def own_prompt(index: int, line: int, fields: Mapping[str, Any]) -> DatasetPrompt:
    """Return the prompt of a row in this project's own columns.

    Args:
        index: Number of the prompt.
        line: Number of the line.
        fields: The fields by lower-case name; None and empty texts count as not given.

    Returns:
        The prompt.

    Raises:
        DatasetError: A field is misspelt or has a wrong value.
    """
    given = {name: value for name, value in fields.items() if value is not None and value != ""}
    for name in given:
        hint = "" if name in COLUMNS else did_you_mean(name, COLUMNS)
        if hint:
            raise DatasetError(f"line {line}: unknown field {name!r}{hint}")
    if given.get("images"):
        raise DatasetError(f"line {line}: input images are not supported; leave out `images`")
    if "negative" in given and "negative_prompt" in given:
        raise DatasetError(f"line {line}: give negative_prompt or negative, not both")
    negative = given.get("negative_prompt", given.get("negative"))
    if negative is not None and not isinstance(negative, str):
        raise DatasetError(f"line {line}: negative_prompt={negative!r} is no text")
    height, width = _whole(line, given, "height", 1, MAX_SIDE), _whole(line, given, "width", 1, MAX_SIDE)
    if "size" in given:
        if height is not None or width is not None:
            raise DatasetError(f"line {line}: give size, or height and width, not both")
        width, height = _size(line, given["size"])
    made = _prompt(index, line, _required(line, given, "prompt"), given.get("category"), given.get("id"))
    seed = _whole(line, given, "seed", 0, MAX_SEED)
    return DatasetPrompt(index, made.prompt, made.id, line, made.categories, seed, negative, height, width)


def unused_fields(prompts_text: str, form: str) -> list[str]:
    """Return the fields of the first row of a file in our own columns that have no effect."""
    rows = {"jsonl": _json_lines, "csv": lambda text: _table(text, ",", ()), "tsv": lambda text: _table(text, "\t", ())}
    first = next(rows[form](prompts_text), None) if form in rows else None
    return [] if first is None else [name for name in first[1] if name not in COLUMNS]


def _prompt(index: int, line: int, prompt: object, category: object, name: object = None) -> DatasetPrompt:
    if not isinstance(prompt, str):
        raise DatasetError(f"line {line}: the prompt {prompt!r} is no text")
    if not prompt.strip():
        raise DatasetError(f"line {line}: the prompt is empty; write one, or take the line out")
    if category is not None and not isinstance(category, str):
        raise DatasetError(f"line {line}: the category {category!r} is no text")
    if name is not None and not isinstance(name, str | int):
        raise DatasetError(f"line {line}: the id {name!r} is no text or number")
    own = str(index) if name is None else str(name)
    return DatasetPrompt(index, prompt.strip(), own, line, (category.strip(),) if category else ())


def _required(line: int, fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise DatasetError(f"line {line}: no {name}")
    return fields[name]


def _whole(line: int, fields: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise DatasetError(f"line {line}: {name}={value!r}; give a whole number from {low} to {high}")
    return value


def _size(line: int, value: object) -> tuple[int, int]:
    """Return width and height of `WIDTHxHEIGHT`, as OpenAI's API writes a size."""
    sides = value.lower().split("x") if isinstance(value, str) else []
    if len(sides) != 2 or not all(side.strip().isdecimal() and 0 < int(side) <= MAX_SIDE for side in sides):
        raise DatasetError(f"line {line}: size={value!r}; write WIDTHxHEIGHT, such as 512x768")
    return int(sides[0]), int(sides[1])


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"is no JSON ({error})") from error


def _json_lines(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"line {number} is no JSON ({error})") from error
        if not isinstance(fields, dict):
            raise DatasetError(f"line {number} is no JSON object; write one {{...}} per line")
        yield number, {str(name).lower(): value for name, value in fields.items()}


def _entries(entries: list[Any]) -> Iterator[Row]:
    for number, fields in enumerate(entries, start=1):
        if not isinstance(fields, dict):
            raise DatasetError(f"entry {number} is no object")
        yield number, fields


def _table(text: str, delimiter: str, columns: tuple[str, ...], quoted: bool = True) -> Iterator[Row]:
    """Yield the rows of a table with a header; blank lines are skipped."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] | None = None
    begun = 1
    csv.field_size_limit(MAX_FIELD)
    try:
        for fields in reader:
            line, begun = begun, reader.line_num + 1
            if not any(field.strip() for field in fields):
                continue
            if header is None:
                header = _header(fields, columns)
                continue
            if len(fields) > len(header) or len(fields) < min(len(header), 1 + _last(header, columns)):
                raise DatasetError(f"line {line} has {len(fields)} fields, and the header {len(header)}")
            yield line, dict(zip(header, fields, strict=False))
    except csv.Error as error:
        raise DatasetError(f"line {begun} is no row of a table ({error})") from error


def _header(fields: list[str], columns: tuple[str, ...]) -> list[str]:
    names = [field.strip().lower() for field in fields]
    for column in columns:
        if column not in names:
            raise DatasetError(f"has no column {column!r} in its header, which is {', '.join(map(repr, fields[:8]))}")
    return names


def _last(header: list[str], columns: tuple[str, ...]) -> int:
    return max((header.index(column) for column in columns), default=0)
