"""Prompts through Qwen2.5-VL: inside a fixed instruction, whose tokens are dropped from the network's input."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from models.checkpoint_source import CheckpointSource
from models.components import Conditioning
from models.text.load import load_encoder, load_tokenizer
from models.text.qwen import QWEN_DUMMY_TOKENIZER

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEMPLATE_TOKENS = 34  # tokens of the instruction before the prompt, in Qwen's tokenizer
MAX_TOKENS = 1024  # the limit of diffusers' pipeline


class QwenImagePrompts:
    """Qwen2.5-VL's language model with its tokenizer: the final hidden states, from the prompt on.

    The states are those after the last layer and its norm. Each prompt is encoded alone and without padding, so a row's
    length is its prompt's.

    Source: Qwen-Image (arXiv:2508.02324, section 2.1 and its figure 7), as in diffusers' QwenImagePipeline.
    """

    def __init__(self, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def count(self, prompt: str) -> int:
        """Return a prompt's tokens before truncation, with the end of the instruction and without its beginning."""
        return len(self.tokenizer(TEMPLATE.format(prompt)).input_ids) - TEMPLATE_TOKENS

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """Return prompt embeddings (B, S, T) in the encoder's dtype, and their mask if the prompts differ in length."""
        return Conditioning.stack([self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str) -> Conditioning:
        tokens = self.tokenizer(
            TEMPLATE.format(prompt), truncation=True, max_length=self.max_tokens + TEMPLATE_TOKENS, return_tensors="pt"
        )
        output = self.encoder(input_ids=tokens.input_ids.to(self.encoder.device), use_cache=False)
        return Conditioning(output.last_hidden_state[:, TEMPLATE_TOKENS:])


def load_qwen_image_prompts(source: CheckpointSource) -> QwenImagePrompts:
    """Load the prompt encoder of a checkpoint: `text_encoder/`, the full vision-language model, and `tokenizer/`.

    The vision part and the language head are dropped after loading.

    Returns:
        The prompt encoder.

    Raises:
        CheckpointError: Files that transformers cannot read.
        ValueError: More tokens than the checkpoint supports.
    """
    if source.text_tokens > MAX_TOKENS:
        raise ValueError(f"model.text.tokens={source.text_tokens}; Qwen-Image supports {MAX_TOKENS} or fewer")
    tokenizer = load_tokenizer(source, "tokenizer", QWEN_DUMMY_TOKENIZER)
    encoder = load_encoder(source, "text_encoder", Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig)
    return QwenImagePrompts(encoder.model.language_model, tokenizer, source.text_tokens)
