"""The server of task=serve: the supervisor of its ranks, its jobs, and their HTTP routes."""
