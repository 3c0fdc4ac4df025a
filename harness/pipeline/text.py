"""Text encoding: each distinct prompt once, and the negative prompt if guidance needs it.

Encoded prompts are cached by content, up to a limit. The encoders themselves can be dropped after use.
"""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields

from harness.pipeline.guidance import needs_negative
from harness.pipeline.state import RunContext, Sample
from models.components import CLASSIFIER_FREE, Conditioning, GuidanceRule, PromptEncoder

Key = tuple[str, bool]
"""A prompt, and whether it is a negative one."""


@dataclass(frozen=True)
class EncodedPrompt:
    """The conditioning of one prompt, and notes about it.

    Args:
        condition: the conditioning, one row.
        notes: notes for the record.
    """

    condition: Conditioning
    notes: tuple[str, ...] = ()


class PromptCache:
    """A cache of encoded prompts; beyond the limit the least recently used ones are dropped.

    Args:
        limit_mib: the limit, MiB.
    """

    def __init__(self, limit_mib: float) -> None:
        self.limit = limit_mib * 2**20
        self.used = 0
        self._entries: OrderedDict[Key, EncodedPrompt] = OrderedDict()

    def get(self, key: Key) -> EncodedPrompt | None:
        """Return the cached entry of a prompt, if any."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Key, value: EncodedPrompt) -> None:
        """Store an encoded prompt, if it fits."""
        size = _bytes(value.condition)
        if size > self.limit or key in self._entries:
            return
        self._entries[key] = value
        self.used += size
        while self.used > self.limit:
            _, dropped = self._entries.popitem(last=False)
            self.used -= _bytes(dropped.condition)


class TextEncoding:
    """Stage 2.

    Args:
        load: loads the prompt encoder.
        rule: how the checkpoint is guided.
        cache: the cache of encoded prompts; None for no cache.
        keep: whether the encoder stays in memory; otherwise it is loaded for new prompts, and dropped after them.
    """

    name = "text_encoding"
    reads = frozenset({"spec"})
    writes = frozenset({"text", "negative"})

    def __init__(
        self,
        load: Callable[[], PromptEncoder],
        rule: GuidanceRule = CLASSIFIER_FREE,
        cache: PromptCache | None = None,
        keep: bool = True,
    ) -> None:
        self.load = load
        self.rule = rule
        self.cache = PromptCache(0) if cache is None else cache
        self.keep = keep
        self.encoder = load() if keep else None

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        """Encode the prompts of all samples."""
        needed: dict[Key, None] = {}
        for sample in samples:
            needed[(sample.spec.prompt, False)] = None
            if needs_negative(sample.spec, self.rule):
                needed[(sample.spec.negative_prompt, True)] = None
            elif sample.spec.negative_prompt:
                run.notes.append(f"request.negative_prompt has no effect: {_why_no_negative(self.rule)}")
        encoded_by_key = {key: entry for key in needed if (entry := self.cache.get(key)) is not None}
        if encoded_by_key:
            run.notes.append(f"{len(encoded_by_key)} of {len(needed)} distinct prompts were in the prompt cache")
        encoded_by_key |= self._encode([key for key in needed if key not in encoded_by_key], run)
        run.notes.extend(note for key in needed for note in encoded_by_key[key].notes)
        for sample in samples:
            sample.text = encoded_by_key[(sample.spec.prompt, False)].condition
            if needs_negative(sample.spec, self.rule):
                sample.negative = encoded_by_key[(sample.spec.negative_prompt, True)].condition

    def _encode(self, keys: list[Key], run: RunContext) -> dict[Key, EncodedPrompt]:
        if not keys:
            return {}
        began = time.perf_counter()
        encoder = self.load() if self.encoder is None else self.encoder
        load_ms = (time.perf_counter() - began) * 1e3
        encoded = {}
        for prompt, negative in keys:
            run.check_cancelled()
            tokens, most = encoder.count(prompt), encoder.max_tokens
            notes = (f"a prompt of {tokens} tokens was truncated to {most}: {prompt[:40]!r}",) if tokens > most else ()
            with run.clock.network("text_encoder"):
                encoded[(prompt, negative)] = EncodedPrompt(encoder([prompt], negative), notes)
            self.cache.put((prompt, negative), encoded[(prompt, negative)])
        if not self.keep:
            before = run.memory.used_mib()
            del encoder
            gc.collect()
            run.memory.release()
            freed = before - run.memory.used_mib()
            run.notes.append(
                f"the text encoders were loaded for this request in {load_ms:.0f} ms and dropped: {freed:.0f} MiB freed"
            )
        return encoded


def _why_no_negative(rule: GuidanceRule) -> str:
    if rule.embedded:
        return "this network takes the guidance scale as an input and has no negative branch"
    return "request.guidance=1 is no guidance"


def _bytes(value: Conditioning) -> int:
    """Return the memory that a conditioning holds; a slice of a larger tensor holds all of it."""
    tensors = [getattr(value, f.name) for f in fields(value)]
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)
