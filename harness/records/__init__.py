"""The folder of a run, its record, its provenance, and its images and videos; `load` reads a tree of records."""

from harness.records.record import load

__all__ = ["load"]
