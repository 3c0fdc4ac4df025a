"""Baseline engines: the same request run by another engine's pipeline and measured by the same code."""
