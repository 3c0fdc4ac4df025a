"""task=train: data, VAE, text encoder and denoiser of a small model, trained, exported and scored."""
