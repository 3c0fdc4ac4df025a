"""The dummy tokenizer and chat template of Qwen's language models as text encoders."""

from __future__ import annotations

from models.text.load import DummyTokenizer

CHAT_ML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN_DUMMY_TOKENIZER = DummyTokenizer(
    special={"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    roles={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    first_byte=0,
    chat_template=CHAT_ML,
)
