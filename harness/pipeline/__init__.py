"""The staged pipeline: text encoding, timesteps, latents, denoising, decoding, run by an executor."""
