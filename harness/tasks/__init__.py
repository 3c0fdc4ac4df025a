"""One entry point for each task."""
