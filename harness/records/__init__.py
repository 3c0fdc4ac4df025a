"""The folder of a run, its record, its provenance, and its images and videos; `load` reads a tree of records."""

from harness.records.export import save
from harness.records.match import compare
from harness.records.table import load

__all__ = ["compare", "load", "save"]
