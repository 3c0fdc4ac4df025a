"""One file per family of diffusers pipelines: how its pipeline is built, called and decoded."""
