"""Peers: the same request drawn by another engine's pipeline, measured by the same code."""
