"""diffusers' DiTPipeline, which takes no latents and gives none: generators make its noise, and a stand-in takes the
VAE's place.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from torch import Tensor

from harness.baselines.load import load_denoiser
from harness.baselines.model import BaselineModel, PipelineBatch, check_guidance, kl_pixels
from harness.pipeline.state import Ask, written
from harness.resolve.engine import refuse_negative_class
from models.components import Components
from models.decoders import load_from_diffusers
from models.dit.prompts import ClassLabels, read_names
from models.dit.weights import NAMES
from models.source import Source


class PassthroughVAE:
    """In the place of the pipeline's VAE, which decodes whatever is asked for: it keeps the latents as they are."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(scaling_factor=1.0)
        self.latent: Tensor | None = None

    def decode(self, latent_BCHW: Tensor) -> SimpleNamespace:
        """What was handed in."""
        self.latent = latent_BCHW
        return SimpleNamespace(sample=latent_BCHW)


def _denoise(pipeline: DiTPipeline, passthrough: PassthroughVAE, labels: ClassLabels, batch: PipelineBatch) -> Tensor:
    """The pipeline's loop, from noise that it draws by the same seeds."""
    generators = [torch.Generator("cpu").manual_seed(ask.seed) for ask in batch.asks]
    classes = [labels.label(ask.prompt) for ask in batch.asks]
    pipeline(classes, batch.ask.guidance, generators, batch.ask.steps, output_type="pt", return_dict=False)
    return written(passthrough.latent)


def _decode(vae: AutoencoderKL, latent: Tensor, /) -> Tensor:
    """As the pipeline."""
    return kl_pixels(vae, VaeImageProcessor(), latent / vae.config.scaling_factor)


def _check(side: int, ask: Ask) -> None:
    """Refuses sizes but the network's own, a negative class, and scales below 1. Raises ValueError."""
    check_guidance(ask)
    if (ask.height, ask.width) != (side, side):
        raise ValueError(
            f"the request asks for {ask.height} x {ask.width} pixels; diffusers' DiTPipeline draws {side} x {side}"
        )
    refuse_negative_class(ask.negative_prompt)


def load(source: Source, parts: Components) -> BaselineModel:
    """The pipeline of a checkpoint. Raises CheckpointError."""
    network = load_denoiser(source, DiTTransformer2DModel, parts.network, NAMES, ("Transformer2DModel",))
    vae, passthrough = load_from_diffusers(source, "vae", AutoencoderKL), PassthroughVAE()
    labels = ClassLabels(read_names(source.index()), network.config.num_embeds_ada_norm, source.device)
    pipeline = DiTPipeline(network, passthrough, None)
    return BaselineModel(
        pipeline,
        network,
        labels,
        partial(_denoise, pipeline, passthrough, labels),
        partial(_decode, vae),
        partial(_check, network.config.sample_size * parts.latent.stride),
    )
