"""Text encoders and their tokenizers, through transformers, from a folder on disk and never from a hub."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel
from transformers.utils import logging as transformers_logging

from models.checkpoint import refuse_misfits
from models.components import TextStates
from models.files import CheckpointError


class T5TextEncoder:
    """A T5 encoder with its tokenizer: each prompt padded or cut to `max_tokens`, padding masked.

    Prompts are encoded one at a time, so that a state does not depend on its neighbours in a batch.

    Source: PixArt-alpha's use of T5 (arXiv:2310.00426), as in diffusers' PixArtSigmaPipeline.
    """

    def __init__(self, encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def count(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut, the end-of-text token included."""
        return len(self.tokenizer(prompt).input_ids)

    def __call__(self, prompts: list[str]) -> TextStates:
        """States (B, max_tokens, T) in the encoder's dtype, and their mask."""
        encoded = [self._encode(prompt) for prompt in prompts]
        return TextStates(torch.cat([e.states for e in encoded]), torch.cat([e.mask for e in encoded]))

    def _encode(self, prompt: str) -> TextStates:
        tokens = self.tokenizer(
            prompt, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).to(self.encoder.device)
        states = self.encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return TextStates(states, tokens.attention_mask.bool())


def load_t5(
    folder: Path, dtype: torch.dtype, device: torch.device, max_tokens: int, dummy: bool = False
) -> T5TextEncoder:
    """The text encoder of a checkpoint in the diffusers layout (`text_encoder/`, `tokenizer/`).

    Args:
        folder: the checkpoint.
        max_tokens: tokens a prompt is padded or cut to.
        dummy: random weights of the same architecture.

    Raises:
        CheckpointError: files that transformers cannot read.
    """
    transformers_logging.disable_progress_bar()  # a rank's log is a file
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        if dummy:
            encoder = T5EncoderModel(T5Config.from_pretrained(folder / "text_encoder", local_files_only=True))
        else:
            encoder, found = T5EncoderModel.from_pretrained(
                folder / "text_encoder",
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            refuse_misfits(found, folder / "text_encoder")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the text encoder cannot be read ({str(error).splitlines()[0]})") from error
    return T5TextEncoder(encoder.to(device=device, dtype=dtype).eval(), tokenizer, max_tokens)
