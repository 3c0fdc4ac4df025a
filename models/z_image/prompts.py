"""Prompts through Qwen3: as a user's turn in its chat template, with the states before the last layer."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3Model

from models.checkpoint_source import CheckpointSource
from models.component_rules import check_chat_template
from models.components import Conditioning
from models.text.load import load_encoder, load_tokenizer
from models.text.qwen import QWEN_DUMMY_TOKENIZER


class ZImagePrompts:
    """A Qwen3 language model with its tokenizer: the states that enter the last layer, without the final norm.

    Each prompt is encoded alone and without padding, so a row's length is its prompt's.

    Source: Z-Image (arXiv:2511.22699, section 4), as in diffusers' ZImagePipeline.
    """

    def __init__(self, encoder: Qwen3Model, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def count(self, prompt: str) -> int:
        """Return the number of tokens of a prompt before truncation, the chat template's tokens included."""
        return len(self.tokenizer(self._turn(prompt)).input_ids)

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """Return prompt embeddings (B, S, T) in the encoder's dtype, and their mask if the prompts differ in length."""
        return Conditioning.stack([self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str) -> Conditioning:
        tokens = self.tokenizer(
            self._turn(prompt), truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).input_ids
        output = self.encoder(input_ids=tokens.to(self.encoder.device), output_hidden_states=True, use_cache=False)
        return Conditioning(output.hidden_states[-2])

    def _turn(self, prompt: str) -> str:
        turn: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return turn


def load_z_image_prompts(source: CheckpointSource) -> ZImagePrompts:
    """Load the prompt encoder of a checkpoint: `text_encoder/` and `tokenizer/`.

    Returns:
        The prompt encoder.

    Raises:
        CheckpointError: Files that transformers cannot read, or a tokenizer without a chat template.
    """
    if source.has("tokenizer"):
        check_chat_template(source.config_folder("tokenizer"))
    tokenizer = load_tokenizer(source, "tokenizer", QWEN_DUMMY_TOKENIZER)
    return ZImagePrompts(load_encoder(source, "text_encoder", Qwen3Model, Qwen3Config), tokenizer, source.text_tokens)
