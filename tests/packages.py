"""Packages that a test takes for installed, or for missing."""

import importlib.util

import pytest


def pretend(monkeypatch: pytest.MonkeyPatch, package: str, found: object) -> None:
    """A package is installed (`found` is anything), or is not (None)."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: found if name == package else find(name))
