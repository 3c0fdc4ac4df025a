"""The configuration: dataclasses with every key, and the checks of single groups."""
