"""Choosing and preparing a device: clock, memory, energy, allocator."""
