"""Decoding: latents to pixels, micro-batch by micro-batch; a single frame of a video model is an image."""

from __future__ import annotations

import torch

from harness.messages import DECODING
from harness.pipeline.state import RunContext, Sample, micro_batches, require
from models.components import Decoder


class Decoding:
    """Stage 6.

    Args:
        decoder: latents to pixels.
    """

    name = DECODING
    reads = frozenset({"latent"})
    writes = frozenset({"pixels"})

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        """Decode the latent of every sample."""
        done = 0
        for batch in micro_batches(samples, run.batch_size):
            run.check_cancelled()
            if len(batch) < len(samples):
                run.on_progress(self.name, done, len(samples))
            done += len(batch)
            latent = torch.stack([require(sample.latent) for sample in batch])
            with run.clock.network("decoder"):
                pixels = self.decoder(latent)
            for sample, image in zip(batch, pixels, strict=True):
                sample.pixels = image[0] if image.ndim == 4 and sample.spec.frames == 1 else image
        run.require_finite(require(sample.pixels) for sample in samples)
