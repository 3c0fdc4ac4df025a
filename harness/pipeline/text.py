"""Text encoding: each distinct prompt once, and the negative prompt where guidance needs it."""

from __future__ import annotations

from harness.pipeline.state import RunContext, Sample
from models.components import TextEncoder, TextStates


class TextEncoding:
    """Stage 2."""

    name = "text_encoding"
    reads = frozenset({"ask"})
    writes = frozenset({"text", "negative"})

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        known: dict[str, TextStates] = {}
        for sample in samples:
            sample.text = self._states(sample.ask.prompt, known, run)
            if sample.ask.guidance != 1:
                sample.negative = self._states(sample.ask.negative_prompt, known, run)

    def _states(self, prompt: str, known: dict[str, TextStates], run: RunContext) -> TextStates:
        if prompt not in known:
            tokens = self.encoder.count(prompt)
            if tokens > self.encoder.max_tokens:
                run.notes.append(f"a prompt of {tokens} tokens was cut to {self.encoder.max_tokens}: {prompt[:40]!r}")
            with run.clock.network("text_encoder"):
                known[prompt] = self.encoder([prompt])
        return known[prompt]
