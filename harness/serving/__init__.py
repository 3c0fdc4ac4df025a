"""Serving: transport, request queue and policies, request schedulers of rank 0, and the worker of every rank."""
