"""The staged pipeline: text encoding, timesteps, latents, denoising and decoding, run by an executor."""
