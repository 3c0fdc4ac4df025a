"""Data sets of prompts: readers of files, samples and shards. Nothing here imports torch."""
