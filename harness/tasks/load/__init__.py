"""Clients that load an engine or a server, and what they measure: task=load."""
