"""Solvers: one step from a grid row to the next, written once for every Gaussian path."""
