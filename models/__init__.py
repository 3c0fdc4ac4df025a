"""Single-device networks: what a diffusion pipeline computes, with no knowledge of ranks, requests or records."""
