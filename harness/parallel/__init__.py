"""Ranks: the mesh of a layout, and the collectives that go over it."""
