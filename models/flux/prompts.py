"""Prompts of FLUX.1: T5's states, and CLIP's pooled vector without a projection.

Source: FLUX.1 (github.com/black-forest-labs/flux), as in diffusers' FluxPipeline.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.checkpoint_source import CheckpointSource
from models.components import Conditioning
from models.text.clip import ClipEncoder, load_clip
from models.text.t5 import T5Encoder, load_t5


class FluxPrompts:
    """T5 states of a prompt, without a padding mask, and CLIP's vector of the same prompt."""

    def __init__(self, clip: ClipEncoder, t5: T5Encoder) -> None:
        self.clip = clip
        self.t5 = t5
        self.max_tokens = t5.max_tokens

    def count(self, prompt: str) -> int:
        """Return T5's number of tokens of a prompt before truncation."""
        return self.t5.count(prompt)

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """Return prompt embeddings (B, max_tokens, T) and pooled vectors (B, P)."""
        return Conditioning.stack(
            [Conditioning(self.t5(prompt), pooled=self.clip(prompt).pooled) for prompt in prompts]
        )


def load_flux_prompts(source: CheckpointSource) -> FluxPrompts:
    """Load the prompt encoder of a checkpoint: `text_encoder/` (CLIP), `text_encoder_2/` (T5) and their tokenizers.

    Returns:
        The prompt encoder.

    Raises:
        CheckpointError: Files that transformers cannot read.
    """
    clip = load_clip(source, "text_encoder", "tokenizer", projected=False)
    return FluxPrompts(clip, load_t5(source, "text_encoder_2", "tokenizer_2"))
