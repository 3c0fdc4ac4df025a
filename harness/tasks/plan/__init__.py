"""task=plan: what every legal layout would cost on a machine, without running it."""
