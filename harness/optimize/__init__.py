"""Faster evaluations with the same result: engine.optimize."""
