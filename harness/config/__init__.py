"""The configuration: dataclasses with every key, and the bounds on what a request may ask."""
