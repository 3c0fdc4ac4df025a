"""DiffusionGenerator, and what it returns."""
