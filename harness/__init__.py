"""Triptych's harness: requests, ranks, the staged pipeline, measurement and records."""
