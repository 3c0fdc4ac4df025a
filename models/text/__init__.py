"""Prompt encoders: text encoders and tokenizers through transformers, from a folder on disk and never from a hub."""
