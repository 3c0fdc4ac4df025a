"""Triptych's harness: requests, ranks, the staged pipeline, measuring and recording."""
