"""Prompts through Qwen2.5-VL: inside a fixed instruction, whose tokens are dropped from what the network sees."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from models.components import Conditioning
from models.source import Source
from models.text.load import load_encoder, load_tokenizer
from models.text.qwen import QWEN_STAND_IN

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED = 34  # tokens of the instruction, in Qwen's tokenizer
MAX_TOKENS = 1024  # the longest that diffusers' pipeline takes


class QwenImagePrompts:
    """The text side of Qwen2.5-VL with its tokenizer: states after the last layer and its norm, from the prompt on.

    Each prompt is encoded alone and without padding, so a row's length is its prompt's.

    Source: Qwen-Image (arXiv:2508.02324, section 2.1 and its figure 7), as in diffusers' QwenImagePipeline.
    """

    def __init__(self, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut, with the instruction's end and without its beginning."""
        return len(self.tokenizer(TEMPLATE.format(prompt)).input_ids) - DROPPED

    def __call__(self, prompts: Sequence[str], negative: bool = False) -> Conditioning:
        """States (B, S, T) in the encoder's dtype, and their mask where the prompts differ in length."""
        return Conditioning.stack([self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str) -> Conditioning:
        tokens = self.tokenizer(
            TEMPLATE.format(prompt), truncation=True, max_length=self.max_tokens + DROPPED, return_tensors="pt"
        )
        found = self.encoder(input_ids=tokens.input_ids.to(self.encoder.device), use_cache=False)
        return Conditioning(found.last_hidden_state[:, DROPPED:])


def load_qwen_image_prompts(source: Source) -> QwenImagePrompts:
    """The prompt encoder of a checkpoint with `text_encoder/`, the whole vision-language model, and `tokenizer/`.

    What looks at pictures and what predicts words is dropped once it is loaded.

    Raises:
        CheckpointError: files that transformers cannot read.
        ValueError: more tokens than the checkpoint takes.
    """
    if source.text_tokens > MAX_TOKENS:
        raise ValueError(f"model.text.tokens={source.text_tokens}; Qwen-Image takes {MAX_TOKENS} or fewer")
    tokenizer = load_tokenizer(source, "tokenizer", QWEN_STAND_IN)
    whole = load_encoder(source, "text_encoder", Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig)
    return QwenImagePrompts(whole.model.language_model, tokenizer, source.text_tokens)
