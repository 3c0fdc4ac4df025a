"""Serving: the transport, the request scheduler of rank 0, the worker of every rank, and how they are built."""
