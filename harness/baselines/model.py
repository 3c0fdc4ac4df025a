"""The interface of a family of diffusers pipelines: one micro-batch in, latents out, and the parts around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from harness.pipeline.state import ImageSpec
from harness.resolve.engine import refuse_weak_guidance
from models.checkpoint_source import CheckpointSource
from models.components import Components, Conditioning, PromptEncoder


@dataclass(frozen=True)
class PipelineBatch:
    """One micro-batch, as the input of a pipeline.

    Args:
        specs: the specification of each image; they differ in prompt and seed only.
        noise: standard normal noise, (B, C, H, W) or (B, C, F, H, W), float32 on the device.
        text: the conditioning of the prompts, one row per image.
        negative: the conditioning of the negative prompts, one row per image, if guidance needs it.
    """

    specs: Sequence[ImageSpec]
    noise: Tensor
    text: Conditioning
    negative: Conditioning | None

    @property
    def spec(self) -> ImageSpec:
        """The specification that all images share."""
        return self.specs[0]

    def shared_arguments(self, latents: Tensor) -> dict[str, object]:
        """Return the arguments that all pipelines have in common."""
        return {
            "num_inference_steps": self.spec.steps,
            "height": self.spec.height,
            "width": self.spec.width,
            "latents": latents,
            "output_type": "latent",
            "return_dict": False,
        }

    def prompt_embeds(self) -> dict[str, Tensor | None]:
        """Return the prompt embeddings, by the names of the pipelines' arguments."""
        return {
            "prompt_embeds": self.text.prompt_embeds,
            "negative_prompt_embeds": None if self.negative is None else self.negative.prompt_embeds,
        }

    def pooled_embeds(self) -> dict[str, Tensor | None]:
        """Return the pooled prompt embeddings, by the names of the pipelines' arguments."""
        return {
            "pooled_prompt_embeds": self.text.pooled,
            "negative_pooled_prompt_embeds": None if self.negative is None else self.negative.pooled,
        }


def check_guidance(spec: ImageSpec) -> None:
    """Refuse guidance below 1, for a pipeline that guides above 1 only. Raises ValueError."""
    refuse_weak_guidance(spec.guidance)


def accept_all(spec: ImageSpec) -> None:
    """Accept everything, for a pipeline that generates all that the native one does."""


@dataclass(frozen=True)
class BaselineModel:
    """A diffusers pipeline and what the stages need to know about it.

    Args:
        pipeline: the pipeline; its noise scheduler is set before each micro-batch.
        network: the denoiser in it.
        prompts: the pipeline's own prompt encoding.
        denoise: the pipeline's loop, from a batch to latents of the noise's shape.
        decode: the pipeline's decoding of latents (models.components.Decoder).
        check: a function that raises ValueError for what the native pipeline can generate and this one cannot.
        pack: a function from a state of the noise's shape to the pipeline's own layout.
        separate_guidance: whether a guided pair takes two forwards.
    """

    pipeline: DiffusionPipeline
    network: ModelMixin
    prompts: PromptEncoder
    denoise: Callable[[PipelineBatch], Tensor]
    decode: Callable[[Tensor], Tensor]
    check: Callable[[ImageSpec], None] = check_guidance
    pack: Callable[[Tensor], Tensor] = lambda latent: latent
    separate_guidance: bool = False


class BaselineLoader(Protocol):
    """The function `load` of a family's module."""

    def __call__(self, source: CheckpointSource, parts: Components) -> BaselineModel:
        """Load the pipeline with its weights.

        Args:
            source: the checkpoint.
            parts: the native components without memory, for geometry and the order of random weights.
        """


class BaselinePrompts:
    """A PromptEncoder around a pipeline's encode_prompt; each prompt is encoded by itself.

    Args:
        counter: an encoder that counts and truncates tokens as the pipeline does.
        encode: a function of one prompt, and of whether it is a negative prompt.
    """

    def __init__(self, counter: PromptEncoder, encode: Callable[[str, bool], Conditioning]) -> None:
        self.counter = counter
        self.encode = encode
        self.max_tokens = counter.max_tokens

    def count(self, prompt: str) -> int:
        """Return the tokens of a prompt before it is truncated."""
        return self.counter.count(prompt)

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """Return the conditioning, one row per prompt."""
        return Conditioning.stack([self.encode(prompt, negative) for prompt in prompts])


def kl_pixels(vae: AutoencoderKL, processor: VaeImageProcessor, z_BCHW: Tensor) -> Tensor:
    """Decode latents that have the autoencoder's own scale, as pipelines do."""
    image = vae.decode(z_BCHW.to(vae.dtype), return_dict=False)[0]
    pixels: Tensor = processor.postprocess(image, output_type="pt")
    return pixels.float()
