"""Measuring: clocks that synchronise the device, memory, and statistics with their spread."""
