"""Prompts are encoded once: known prompts are kept within a bound, and the encoders may be dropped in between."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.build.common import DEFAULT_CACHE_MIB, cache_mib
from harness.client.generator import DiffusionGenerator, Generation
from harness.device.clock import Clock
from harness.device.memory import ResidentMemory
from harness.pipeline.state import Cancelled, ImageSpec, RunContext, Sample
from harness.pipeline.text import EncodedPrompt, PromptCache, TextEncoding
from harness.records.record import read_record
from harness.resolve.compose import ConfigError, compose_run
from models.components import Conditioning, GuidanceRule
from models.registry import REFERENCE

MIB = 2**20
INPROCESS = ("launch.mode=inprocess", "launch.threads_per_rank=1", "request.steps=2", "request.height=32")


class Encoder:
    """Records what it encodes; an encoding is 1 MiB and says which prompt it is of, and whether it is negative."""

    max_tokens = 8

    def __init__(self, requested: list[tuple[str, bool]], weights_mib: int = 0) -> None:
        self.requested = requested
        self.weights = torch.ones(weights_mib, MIB, dtype=torch.uint8)

    def count(self, prompt: str) -> int:
        return len(prompt)

    def __call__(self, prompts: list[str], negative: bool = False) -> Conditioning:
        self.requested += [(prompt, negative) for prompt in prompts]
        code = float(sum(map(ord, prompts[0])) + 1000 * negative)
        return Conditioning(torch.full((1, 8, MIB // 32), code))


class Loader:
    """Makes encoders; counts them and their calls."""

    def __init__(self, weights_mib: int = 0) -> None:
        self.requested: list[tuple[str, bool]] = []
        self.loads = 0
        self.weights_mib = weights_mib

    def __call__(self) -> Encoder:
        self.loads += 1
        return Encoder(self.requested, self.weights_mib)


def context(check_cancelled: Callable[[], None] = lambda: None) -> RunContext:
    clock = Clock(lambda: None)
    return RunContext(torch.device("cpu"), 1, clock, ResidentMemory(), lambda *progress: None, check_cancelled)


def samples(*prompts: str, negative: str = "", guidance: float = 3.0) -> list[Sample]:
    return [Sample(ImageSpec(k, prompt, negative, k, 2, guidance, 16, 16)) for k, prompt in enumerate(prompts)]


def encode(
    stage: TextEncoding, *prompts: str, negative: str = "", guidance: float = 3.0
) -> tuple[list[Sample], list[str]]:
    run, requested = context(), samples(*prompts, negative=negative, guidance=guidance)
    stage.forward(requested, run)
    return requested, run.notes


def code(value: Conditioning | None) -> float:
    assert value is not None
    return float(value.require_prompt_embeds()[0, 0, 0])


def test_a_prompt_that_was_seen_is_not_encoded_again() -> None:
    loader = Loader()
    stage = TextEncoding(loader, cache=PromptCache(64))
    first, notes = encode(stage, "a", "b")
    assert loader.requested == [("a", False), ("", True), ("b", False)]
    assert notes == []
    again, notes = encode(stage, "b", "c", "a")
    assert loader.requested[3:] == [("c", False)]
    assert notes == ["3 of 4 distinct prompts were in the prompt cache"]
    assert [code(sample.text) for sample in again] == [ord("b"), ord("c"), ord("a")]
    assert [code(sample.negative) for sample in again] == [1000.0] * 3
    assert again[2].text is first[0].text
    assert loader.loads == 1


def test_a_negative_prompt_is_another_thing() -> None:
    """Some checkpoints treat an empty negative prompt apart, so one text may have two encodings."""
    loader = Loader()
    stage = TextEncoding(loader, cache=PromptCache(64))
    (sample,), _ = encode(stage, "x", negative="x")
    assert loader.requested == [("x", False), ("x", True)]
    assert (code(sample.text), code(sample.negative)) == (ord("x"), 1000 + ord("x"))
    (sample,), notes = encode(stage, "x", negative="x")
    assert (code(sample.text), code(sample.negative)) == (ord("x"), 1000 + ord("x"))
    assert notes == ["2 of 2 distinct prompts were in the prompt cache"]


@pytest.mark.parametrize(("guidance", "rule"), [(1.0, GuidanceRule()), (3.0, GuidanceRule(embedded=True))])
def test_without_a_negative_branch_none_is_encoded(guidance: float, rule: GuidanceRule) -> None:
    loader = Loader()
    (sample,), _ = encode(TextEncoding(loader, rule), "a", negative="b", guidance=guidance)
    assert loader.requested == [("a", False)]
    assert sample.negative is None


def test_the_cache_keeps_within_its_bound_and_drops_the_least_recent() -> None:
    cache = PromptCache(3)
    encoder = Encoder([])
    for prompt in "abc":
        cache.put((prompt, False), EncodedPrompt(encoder([prompt])))
    assert cache.used == 3 * MIB
    assert cache.get(("a", False)) is not None  # now "b" is the least recently used
    cache.put(("d", False), EncodedPrompt(encoder(["d"])))
    assert cache.used == 3 * MIB
    assert [prompt for prompt in "abcd" if cache.get((prompt, False)) is not None] == ["a", "c", "d"]


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    cache = PromptCache(0.5)
    cache.put(("a", False), EncodedPrompt(Encoder([])(["a"])))
    assert cache.get(("a", False)) is None
    assert cache.used == 0


def test_a_part_of_a_larger_tensor_counts_as_what_it_keeps() -> None:
    cache = PromptCache(64)
    cache.put(("a", False), EncodedPrompt(Conditioning(torch.zeros(1, 8, MIB // 4)[:, :1])))
    assert cache.used == 8 * MIB


def test_a_cache_of_nothing_encodes_every_time() -> None:
    loader = Loader()
    stage = TextEncoding(loader)
    for _ in range(2):
        _, notes = encode(stage, "a", "a")
        assert notes == []
    assert loader.requested == [("a", False), ("", True)] * 2


def test_dropped_encoders_are_loaded_for_new_prompts_alone() -> None:
    loader = Loader()
    stage = TextEncoding(loader, cache=PromptCache(64), keep=False)
    assert loader.loads == 0, "nothing is loaded before a request"
    _, notes = encode(stage, "a")
    assert loader.loads == 1
    assert [note.startswith("the text encoders were loaded for this request in ") for note in notes] == [True]
    _, notes = encode(stage, "a")
    assert loader.loads == 1
    assert notes == ["2 of 2 distinct prompts were in the prompt cache"]
    again, _ = encode(stage, "b")
    assert loader.loads == 2
    assert code(again[0].text) == ord("b")


def test_dropping_gives_the_memory_back() -> None:
    """The stage's memory checkpoint is what is left after it, and the note says what was saved."""
    before = ResidentMemory().used_mib()
    _, notes = encode(TextEncoding(Loader(weights_mib=300), keep=False), "a")
    assert ResidentMemory().used_mib() - before < 30
    freed = int(notes[0].rpartition("dropped: ")[2].partition(" MiB")[0])
    assert 290 <= freed <= 330
    kept = TextEncoding(Loader(weights_mib=300))
    encode(kept, "a")
    assert ResidentMemory().used_mib() - before > 280


def test_the_note_on_a_truncated_prompt_also_comes_from_the_cache() -> None:
    stage = TextEncoding(Loader(), cache=PromptCache(64))
    cut = "a prompt of 9 tokens was truncated to 8: '123456789'"
    assert encode(stage, "123456789")[1] == [cut]
    assert encode(stage, "123456789")[1] == ["2 of 2 distinct prompts were in the prompt cache", cut]
    assert encode(stage, "12345678")[1] == ["1 of 2 distinct prompts were in the prompt cache"]


def test_a_cancelled_request_leaves_what_it_had_encoded() -> None:
    loader, left = Loader(), [1]

    def check() -> None:
        if not left:
            raise Cancelled
        left.pop()

    stage = TextEncoding(loader, cache=PromptCache(64), keep=False)
    with pytest.raises(Cancelled):
        stage.forward(samples("a", "b"), context(check))
    _, notes = encode(stage, "a", "b")
    assert loader.requested == [("a", False), ("", True), ("b", False)]
    assert notes[0] == "1 of 3 distinct prompts were in the prompt cache"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], DEFAULT_CACHE_MIB),
        (["model.text.keep_loaded=false"], DEFAULT_CACHE_MIB),
        (["task=bench"], 0.0),
        (["task=bench", "model.text.keep_loaded=false"], DEFAULT_CACHE_MIB),
        (["task=bench", "model.text.cache_mib=5"], 5.0),
        (["model.text.cache_mib=0"], 0.0),
        (["model.text.keep_loaded=false", "model.text.cache_mib=0"], 0.0),
    ],
)
def test_a_bench_measures_encoding_unless_disabled(overrides: list[str], expected: float) -> None:
    assert cache_mib(compose_run(overrides).config) == expected


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.text\.cache_mib=-1\.0; give at least 0"):
        compose_run(["model.text.cache_mib=-1"])


def generations(*overrides: str) -> list[Generation]:
    with DiffusionGenerator.from_config(*INPROCESS, *overrides) as generator:
        return [generator.generate(prompts=["rocket", "panda"]) for _ in range(2)]


def notes(generation: Generation) -> list[str]:
    return generation.result.ranks[0].notes


def encoded(generation: Generation) -> int:
    return generation.result.ranks[0].network_evaluations.get("text_encoder", 0)


def test_a_whole_run_generates_the_same_with_and_without_its_encoders() -> None:
    kept = generations()
    dropped = generations("model.text.keep_loaded=false")
    every = generations("model.text.cache_mib=0")
    for ours in (*kept[1:], *dropped, *every):
        assert all((a == b).all() for a, b in zip(ours.pixels, kept[0].pixels, strict=True))
    assert [encoded(generation) for generation in (*kept, *dropped, *every)] == [3, 0, 3, 0, 3, 3]
    assert "3 of 3 distinct prompts were in the prompt cache" in notes(kept[1])
    assert any("MiB freed" in note for note in notes(dropped[0]))
    assert not any("MiB freed" in note for note in notes(dropped[1]))
    assert not any("encoded before" in note for note in notes(every[1]))


@pytest.mark.slow
def test_the_record_shows_the_saving(tmp_path: Path) -> None:
    """It shows in the notes and in the memory of the ready rank, in a process that has freed nothing before."""
    given = ["model.text.keep_loaded=false", "engine.eager.keep_memory=false", "request.prompt=rocket"]
    overrides = [*INPROCESS, *given, f"hydra.run.dir={tmp_path}"]
    subprocess.run([sys.executable, "-m", "harness", *overrides], check=True, stdout=subprocess.DEVNULL)
    record = read_record(tmp_path)
    assert record is not None
    assert {row.component for row in record.loaded} == {"transformer", "vae"}
    assert any("the text encoders were loaded for this request" in note for note in record.notes)
    freed = float(next(note for note in record.notes if "MiB freed" in note).rpartition("dropped: ")[2].split()[0])
    size = sum(file.stat().st_size for file in (REFERENCE / "emoji" / "text_encoder").glob("*.safetensors")) / MIB
    assert freed > 0.5 * size
