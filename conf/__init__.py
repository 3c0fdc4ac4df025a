"""The configurations: one group for each replaceable object. README.md lists every key."""
