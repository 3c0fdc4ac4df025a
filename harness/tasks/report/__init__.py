"""task=report: one self-contained page over a tree of records."""
