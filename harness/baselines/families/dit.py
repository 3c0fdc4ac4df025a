"""diffusers' DiTPipeline, which takes no latents and returns none.

Generators make its noise, and a passthrough replaces the VAE.
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
from harness.pipeline.state import ImageSpec, require
from harness.resolve.engine import refuse_negative_class
from models.checkpoint_source import CheckpointSource
from models.components import Components
from models.decoders import load_from_diffusers
from models.dit.prompts import ClassLabels
from models.dit.weights import NAMES
from models.prompt_rules import read_names


class PassthroughVAE:
    """Replaces the pipeline's VAE, which always decodes, and stores the latents unchanged."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(scaling_factor=1.0)
        self.latent: Tensor | None = None

    def decode(self, latent_BCHW: Tensor) -> SimpleNamespace:
        """Return the input, and store it."""
        self.latent = latent_BCHW
        return SimpleNamespace(sample=latent_BCHW)


def _denoise(pipeline: DiTPipeline, passthrough: PassthroughVAE, labels: ClassLabels, batch: PipelineBatch) -> Tensor:
    """Run the pipeline's loop, from noise that it samples with the same seeds."""
    generators = [torch.Generator("cpu").manual_seed(spec.seed) for spec in batch.specs]
    classes = [labels.label(spec.prompt) for spec in batch.specs]
    pipeline(classes, batch.spec.guidance, generators, batch.spec.steps, output_type="pt", return_dict=False)
    return require(passthrough.latent)


def _decode(vae: AutoencoderKL, latent: Tensor, /) -> Tensor:
    """Decode as the pipeline does."""
    return kl_pixels(vae, VaeImageProcessor(), latent / vae.config.scaling_factor)


def _check(side: int, spec: ImageSpec) -> None:
    """Refuse sizes other than the network's own, a negative class, and scales below 1. Raises ValueError."""
    check_guidance(spec)
    if (spec.height, spec.width) != (side, side):
        raise ValueError(
            f"the request asks for {spec.height} x {spec.width} pixels; "
            f"diffusers' DiTPipeline generates {side} x {side}"
        )
    refuse_negative_class(spec.negative_prompt)


def load(source: CheckpointSource, parts: Components) -> BaselineModel:
    """Load the pipeline of a checkpoint. Raises CheckpointError."""
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
