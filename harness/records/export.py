"""A table of `load` as a file: CSV, JSON or Parquet."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.records.table import to_text

if TYPE_CHECKING:
    import pandas

FORMATS = (".csv", ".json", ".parquet")


def save(table: pandas.DataFrame, path: str | Path) -> None:
    """Write a table to a file, in the format of its suffix.

    What is nested (repeats, samples, lists of texts) is JSON text in CSV and Parquet.

    Args:
        table: A table.
        path: The file, with the suffix .csv, .json or .parquet.

    Raises:
        ValueError: The suffix is another one, or Parquet is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path} has no format; give it one of the suffixes {', '.join(FORMATS)}")
    if suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError("writing Parquet needs the package pyarrow: pip install 'triptych[parquet]', or write a .csv")
    if suffix == ".json":
        table.to_json(path, orient="records", date_format="iso", indent=1, force_ascii=False)
        return
    nested = {str(name): table[name].map(_cell) for name in table if _is_nested(table[name])}
    plain = table.assign(**nested)
    if suffix == ".csv":
        plain.to_csv(path, index=False)
    else:
        plain.to_parquet(path, engine="pyarrow", index=False)


def _is_nested(column: pandas.Series[Any]) -> bool:
    return column.dtype == object and any(isinstance(value, list | tuple | dict) for value in column)


def _cell(value: object) -> object:
    return to_text(value) if isinstance(value, list | tuple | dict) else value
