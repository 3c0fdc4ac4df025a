"""Triptych's harness: requests, ranks, the staged pipeline, measurement and records."""

__version__ = "0.1.0"  # of the distribution triptych: pyproject.toml, records and --version read it here
