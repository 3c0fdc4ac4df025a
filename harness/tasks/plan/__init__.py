"""task=plan: the predicted cost of every valid layout on a machine, without running it."""
