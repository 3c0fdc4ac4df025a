"""Prompts of FLUX.1: T5's states, and CLIP's pooled vector without a projection.

Source: FLUX.1 (github.com/black-forest-labs/flux), as in diffusers' FluxPipeline.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.components import Conditioning
from models.source import Source
from models.text.clip import Clip, load_clip
from models.text.t5 import T5, load_t5


class FluxPrompts:
    """T5 states of a prompt, padding not masked, and CLIP's vector of the same prompt."""

    def __init__(self, clip: Clip, t5: T5) -> None:
        self.clip = clip
        self.t5 = t5
        self.max_tokens = t5.max_tokens

    def count(self, prompt: str) -> int:
        """T5's tokens of a prompt before they are cut."""
        return self.t5.count(prompt)

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """States (B, max_tokens, T) and pooled vectors (B, P)."""
        return Conditioning.stack(
            [Conditioning(self.t5(prompt), pooled=self.clip(prompt).pooled) for prompt in prompts]
        )


def load_flux_prompts(source: Source) -> FluxPrompts:
    """The prompt encoder of a checkpoint with `text_encoder/` (CLIP), `text_encoder_2/` (T5) and their tokenizers.

    Raises:
        CheckpointError: files that transformers cannot read.
    """
    clip = load_clip(source, "text_encoder", "tokenizer", projected=False)
    return FluxPrompts(clip, load_t5(source, "text_encoder_2", "tokenizer_2"))
