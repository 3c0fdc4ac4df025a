"""What a family of diffusers' pipelines offers a run: one micro-batch in, latents out, and the parts around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from harness.pipeline.state import Ask
from harness.resolve.engine import refuse_weak_guidance
from models.components import Components, Conditioning, PromptEncoder
from models.source import Source


@dataclass(frozen=True)
class PipelineBatch:
    """One micro-batch as a pipeline is asked for it.

    Args:
        asks: of each picture; all but prompt and seed are the same.
        noise: standard normal, (B, C, H, W) or (B, C, F, H, W), float32 on the device.
        text: one row a picture.
        negative: one row a picture where guidance needs it.
    """

    asks: Sequence[Ask]
    noise: Tensor
    text: Conditioning
    negative: Conditioning | None

    @property
    def ask(self) -> Ask:
        """What is asked of every picture."""
        return self.asks[0]

    def shared_arguments(self, latents: Tensor) -> dict[str, object]:
        """The arguments that every pipeline names alike."""
        return {
            "num_inference_steps": self.ask.steps,
            "height": self.ask.height,
            "width": self.ask.width,
            "latents": latents,
            "output_type": "latent",
            "return_dict": False,
        }

    def states(self) -> dict[str, Tensor | None]:
        """The token states, by the names that pipelines give them."""
        return {
            "prompt_embeds": self.text.states,
            "negative_prompt_embeds": None if self.negative is None else self.negative.states,
        }

    def vectors(self) -> dict[str, Tensor | None]:
        """The pooled vectors, by the names that pipelines give them."""
        return {
            "pooled_prompt_embeds": self.text.pooled,
            "negative_pooled_prompt_embeds": None if self.negative is None else self.negative.pooled,
        }


def check_guidance(ask: Ask) -> None:
    """For a pipeline that guides above 1 only. Raises ValueError."""
    refuse_weak_guidance(ask.guidance)


def accept_all(ask: Ask) -> None:
    """For a pipeline that draws all that the native one does."""


@dataclass(frozen=True)
class BaselineModel:
    """A pipeline of diffusers, and what has to be known of it.

    Args:
        pipeline: its noise scheduler is set before each micro-batch.
        network: the denoiser in it.
        prompts: prompts through the pipeline's own encoding.
        denoise: its loop; latents of the noise's shape.
        decode: what it does with latents (models.components.Decoder).
        check: raises ValueError for what it cannot draw and the native one can.
        pack: a state of the noise's shape as it holds one.
        separate_guidance: a guided pair takes two forwards.
    """

    pipeline: DiffusionPipeline
    network: ModelMixin
    prompts: PromptEncoder
    denoise: Callable[[PipelineBatch], Tensor]
    decode: Callable[[Tensor], Tensor]
    check: Callable[[Ask], None] = check_guidance
    pack: Callable[[Tensor], Tensor] = lambda latent: latent
    separate_guidance: bool = False


class BaselineLoader(Protocol):
    """What a family's module offers as `load`."""

    def __call__(self, source: Source, parts: Components) -> BaselineModel:
        """The pipeline with its weights.

        Args:
            source: the checkpoint.
            parts: the native components, without memory: geometry, and the order of random weights.
        """


class BaselinePrompts:
    """A PromptEncoder around a pipeline's encode_prompt, each prompt encoded alone.

    Args:
        counted: counts and cuts tokens as the pipeline does.
        encode: one prompt, and whether it is a negative one.
    """

    def __init__(self, counter: PromptEncoder, encode: Callable[[str, bool], Conditioning]) -> None:
        self.counter = counter
        self.encode = encode
        self.max_tokens = counter.max_tokens

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut."""
        return self.counter.count(prompt)

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """One row a prompt."""
        return Conditioning.stack([self.encode(prompt, negative) for prompt in prompts])


def kl_pixels(vae: AutoencoderKL, processor: VaeImageProcessor, z_BCHW: Tensor) -> Tensor:
    """What a pipeline does with latents once they have the autoencoder's own scale."""
    image = vae.decode(z_BCHW.to(vae.dtype), return_dict=False)[0]
    pixels: Tensor = processor.postprocess(image, output_type="pt")
    return pixels.float()
