"""task=serve: the HTTP server, the supervisor of its ranks, and the jobs."""
