"""From overrides to one checked configuration, before a process starts."""
