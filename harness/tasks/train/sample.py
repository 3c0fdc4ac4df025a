"""Sampling from a denoiser in training, through the stages of a request: for sheets of samples and for the score."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from harness.config.train import ScoreConfig
from harness.device.clock import Clock
from harness.device.memory import ResidentMemory
from harness.pipeline.decode import Decoding
from harness.pipeline.denoise import Denoising
from harness.pipeline.executor import SyncExecutor
from harness.pipeline.latents import LatentPreparation
from harness.pipeline.stage import Stage
from harness.pipeline.state import ImageSpec, RunContext, Sample, require
from harness.pipeline.text import TextEncoding
from harness.pipeline.timesteps import TimestepPreparation
from harness.records.media import to_uint8
from models.components import Components, LatentSpace
from models.decoders import KLDecoder
from models.pixart import PixArt
from models.text.t5 import T5Prompts
from schedulers.noise_scheduler import NoiseScheduler

BATCH = 16  # images per forward


def components(
    network: PixArt, autoencoder: AutoencoderKL, encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerFast
) -> Components:
    """Assemble loaded parts to the components of a pipeline.

    Args:
        network: The denoiser.
        autoencoder: The VAE.
        encoder: The text encoder.
        tokenizer: The text encoder's tokenizer.

    Returns:
        The components.
    """
    decoder = KLDecoder(autoencoder)
    prompts = T5Prompts(encoder, tokenizer, tokenizer.model_max_length)
    latent = LatentSpace(decoder.latent_channels, decoder.stride)
    return Components(network, lambda: prompts, decoder, latent, decoder.stride * network.config.patch)


def generate_images(
    parts: Components, noise_scheduler: NoiseScheduler, prompts: Sequence[str], config: ScoreConfig, size: int
) -> np.ndarray:
    """Generate one image per prompt; image i has the noise of seed + i.

    Args:
        parts: Components of the pipeline.
        noise_scheduler: Noise scheduler of the family.
        prompts: Prompts.
        config: Seed, steps and guidance.
        size: Width and height in pixels.

    Returns:
        The images, uint8 (N, size, size, 3).
    """
    stages: list[Stage] = [
        TextEncoding(parts.load_prompts),
        TimestepPreparation(noise_scheduler, parts.size_multiple),
        LatentPreparation(parts.latent, noise_scheduler),
        Denoising(parts.network, torch.float32, noise_scheduler),
        Decoding(parts.decoder),
    ]
    samples = [
        Sample(ImageSpec(i, prompt, "", config.seed + i, config.steps, config.guidance, size, size))
        for i, prompt in enumerate(prompts)
    ]
    run = RunContext(torch.device("cpu"), BATCH, Clock(lambda: None), ResidentMemory(), lambda *_: None, lambda: None)
    SyncExecutor().execute(stages, samples, run)
    return np.stack([to_uint8(require(sample.pixels).numpy()) for sample in samples])
