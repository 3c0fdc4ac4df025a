"""One file a family of diffusers' pipelines: how it is built, called and decoded."""
