"""Mirrors of the record: the terminal's table and Weights & Biases."""
