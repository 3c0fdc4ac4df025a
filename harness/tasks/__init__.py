"""One entry for each task."""
