"""The Python client: DiffusionGenerator, and the Generation that it returns."""

from harness.client.generator import DiffusionGenerator, Generation

__all__ = ["DiffusionGenerator", "Generation"]
