"""The prompt encoders of Stable Diffusion and SDXL, with CLIP, and of an unconditional model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.checkpoint_source import CheckpointSource
from models.components import Conditioning
from models.prompt_rules import check_no_prompt
from models.text.clip import ClipEncoder, load_clip


class ClipPrompts:
    """Stable Diffusion's text: the states after CLIP's last layer and norm, padding included.

    Source: latent diffusion (Rombach et al. 2022), as in diffusers' StableDiffusionPipeline. The OpenCLIP text encoder
    of the second generation is published without its last layer, so that one rule serves both.
    """

    def __init__(self, clip: ClipEncoder) -> None:
        self.clip = clip
        self.max_tokens = clip.max_tokens

    def count(self, prompt: str) -> int:
        """Return the number of tokens of a prompt before truncation, start and end included."""
        return self.clip.count(prompt)

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """Return prompt embeddings (B, max_tokens, T) in the encoder's dtype."""
        return Conditioning(torch.cat([self.clip(prompt).last for prompt in prompts]))


class TwoClipPrompts:
    """SDXL's text: the concatenated penultimate states of two CLIPs, and the second's projected vector.

    Source: Podell et al. 2023, section 2.1, as in diffusers' StableDiffusionXLPipeline.

    Args:
        first: The CLIP without a projection.
        second: The CLIP with a projection.
        zeros_for_empty: Whether an empty negative prompt is zeros, not the encoding of an empty text.
    """

    def __init__(self, first: ClipEncoder, second: ClipEncoder, zeros_for_empty: bool) -> None:
        self.first = first
        self.second = second
        self.zeros_for_empty = zeros_for_empty
        self.max_tokens = first.max_tokens

    def count(self, prompt: str) -> int:
        """Return the larger of the two tokenizers' token counts before truncation, start and end included."""
        return max(self.first.count(prompt), self.second.count(prompt))

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """Return prompt embeddings (B, max_tokens, T1 + T2) and pooled vectors (B, P) in the encoders' dtype."""
        return Conditioning.stack([self._encode(prompt, negative) for prompt in prompts])

    def _encode(self, prompt: str, negative: bool) -> Conditioning:
        one, two = self.first(prompt), self.second(prompt)
        states = torch.cat([one.penultimate, two.penultimate], dim=-1)
        if negative and not prompt and self.zeros_for_empty:
            return Conditioning(torch.zeros_like(states), pooled=torch.zeros_like(two.pooled))
        return Conditioning(states, pooled=two.pooled)


class UnconditionalPrompts:
    """The prompt encoder of a model that takes no prompt."""

    max_tokens = 0

    def count(self, prompt: str) -> int:
        """Return 0 for an empty prompt.

        Raises:
            ValueError: Any other prompt.
        """
        check_no_prompt(prompt)
        return 0

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """Return an empty conditioning."""
        return Conditioning()


def load_clip_prompts(source: CheckpointSource) -> ClipPrompts:
    """Load the prompt encoder of a checkpoint: `text_encoder/` and `tokenizer/`.

    Returns:
        The prompt encoder.

    Raises:
        CheckpointError: Files that transformers cannot read.
    """
    return ClipPrompts(load_clip(source, "text_encoder", "tokenizer", False, source.text_tokens))


def load_two_clip_prompts(source: CheckpointSource) -> TwoClipPrompts:
    """Load the prompt encoder of a checkpoint with two text encoders and two tokenizers.

    Returns:
        The prompt encoder.

    Raises:
        CheckpointError: Files that transformers cannot read.
    """
    first = load_clip(source, "text_encoder", "tokenizer", False, source.text_tokens)
    second = load_clip(source, "text_encoder_2", "tokenizer_2", True, source.text_tokens)
    return TwoClipPrompts(first, second, bool(source.index().get("force_zeros_for_empty_prompt", True)))
