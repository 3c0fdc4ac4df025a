"""A tiny tokenizer of Qwen's class, trained on a few lines, for the end-to-end tests of what has one."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from models.qwen_image.prompts import TEMPLATE
from models.text.qwen import CHAT_ML

VOCABULARY = 384  # ids that a text encoder needs at most


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE whose merges know Qwen-Image's instruction, which has the published 34 tokens, and ChatML."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 8, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([TEMPLATE] * 3, trainer)
    learnt = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_ML,
    )
    assert len(tokenizer) <= VOCABULARY
    return tokenizer
