"""What several tasks share: the life cycle in a run folder, measuring, comparing, messages on the terminal."""
