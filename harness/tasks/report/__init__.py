"""task=report: one self-contained HTML page over a tree of records."""
