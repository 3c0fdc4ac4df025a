"""engine=cache_dit: diffusers' images except for the skipped blocks, and partial evaluations counted as none."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harness.baselines.cache_dit import DBCacheSkips
from harness.device.flops import count_operations
from harness.records.record import Record
from harness.resolve.compose import ConfigError, compose_run
from harness.tasks.common.methods import method_class
from tests.fixtures.generators import generator
from tests.fixtures.models.checkpoints import CASES, PROMPTS, overrides_of
from tests.fixtures.packages import pretend


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cache_dit", None)
    with pytest.raises(ConfigError, match=r"^engine=cache_dit needs the package cache-dit: pip install 'triptych\[cac"):
        compose_run(["engine=cache_dit"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=sd15", "model.load=dummy"], "does not go with model=sd15: .* is a U-Net; use engine=diffusers"),
        (
            ["engine.cache.first_blocks=6"],
            "first_blocks=6 leaves nothing to skip in a network of 6 blocks; give at most 5",
        ),
        (
            ["model=flux", "model.load=dummy", "engine.cache.first_blocks=57"],
            "first_blocks=57 leaves nothing to skip in a network of 57 blocks; give at most 56",
        ),
        (["engine.cache.first_blocks=0"], "first_blocks=0; give 1 to 1000"),
        (["engine.cache.warmup=0"], "warmup=0; give 1 to 10000"),
        (["engine.cache.threshold=0"], "threshold=0.0; give more than 0"),
        (["parallel=dp2"], "does not go with parallel.dp=2; use parallel=single"),
    ],
    ids=str,
)
def test_what_it_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str) -> None:
    pretend(monkeypatch, "cache_dit", object())
    with pytest.raises(ConfigError, match=message):
        compose_run(["engine=cache_dit", *overrides])


def test_it_is_declared_approximate(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cache_dit", object())
    claimed, methods = method_class(compose_run(["engine=cache_dit"]).config)
    assert (claimed, "cache-dit" in methods) == ("approximate", True)


def test_its_keys_have_no_effect_on_another_engine() -> None:
    notes = compose_run(["engine=diffusers", "engine.cache.warmup=2"]).notes
    assert notes == ["engine.cache has no effect with engine=diffusers"]


def test_the_note_says_which_evaluations_were_partial() -> None:
    assert "1 of 6 blocks in 2 of 9 evaluations, which nfe does not count: 4, 7" in DBCacheSkips(
        [4, 7], [], (1, 6)
    ).note(9)
    assert "nfe does not count: none, and in one half of 5" in DBCacheSkips([], [5], (1, 6)).note(9)
    assert "skipped nothing in 9 evaluations; lower engine.cache.warmup" in DBCacheSkips([], [], (1, 6)).note(9)


def test_operations_are_counted_where_modules_form_a_loop() -> None:
    """A block of cache-dit has the network that contains it among its children."""
    network, block, found = nn.Sequential(nn.Linear(4, 4, bias=False)), nn.Identity(), list[int]()
    block.network = network
    network.append(block)
    with count_operations(found.append):
        network(torch.ones(2, 4))
    assert found == [2 * 2 * 4 * 4]


# ---------------------------------------------------------------- with the package


@dataclass(frozen=True)
class GeneratedPair:
    """Return the pixels, the record, and the denoiser's operations in a second generation."""

    pixels: np.ndarray
    record: Record
    flops: int


def generate(*overrides: str, **requested: Any) -> GeneratedPair:
    """Generate one request twice; both must give the same images."""
    with generator(*overrides) as engine:
        first, second = engine.generate(**requested), engine.generate(**requested, count_flops=True)
        assert all(map(np.array_equal, first.pixels, second.pixels)), "what was kept is not of this request"
        return GeneratedPair(np.stack(first.pixels), first.record, second.result.ranks[0].flops["denoiser"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["emoji", "pixart_sigma", "dit", "sd35_medium", "flux", "qwen_image", "z_image", "wan"]
)
def test_its_images_are_diffusers_except_for_what_it_skips(tmp_path: Path, name: str) -> None:
    """With nothing skipped the images are equal bit for bit; else they differ a little, for fewer operations."""
    pytest.importorskip("cache_dit")
    requested: dict[str, Any] = {"prompts": PROMPTS, "seed": 7, "steps": 8, "guidance": 3.0, "batch_size": 2}
    if name == "emoji":
        own, requested = ["model=emoji"], requested | {"prompts": ["red apple", "castle"]}
    else:
        CASES[name].save(tmp_path)
        own, requested = overrides_of(CASES[name], tmp_path), requested | CASES[name].requested
    cache = ["engine=cache_dit", "engine.cache.warmup=2"]
    whole = generate(*own, "engine=diffusers", **requested)
    same = generate(*own, *cache, "engine.cache.threshold=1e-9", **requested)
    less = generate(*own, *cache, "engine.cache.threshold=9", **requested)
    assert np.array_equal(whole.pixels, same.pixels)
    assert (same.record.summary.nfe, same.flops) == (whole.record.summary.nfe, whole.flops)
    assert any("skipped nothing in" in note for note in same.record.notes)

    assert (less.record.engine.name, bool(less.record.engine.version)) == ("cache_dit", True)
    note = next(note for note in less.record.notes if note.startswith("cache-dit computed 1 of "))
    depth, cut, evaluations = map(int, re.findall(r"of (\d+) blocks in (\d+) of (\d+)", note)[0])
    assert cut == 5, "2 to warm up, 3 in a row cut short, one whole, 2 cut short"
    assert less.record.summary.nfe == evaluations - cut
    with pytest.raises(ConfigError, match=f"leaves nothing to skip in a network of {depth} blocks"):
        compose_run([*own, "engine=cache_dit", f"engine.cache.first_blocks={depth}"])
    compose_run([*own, "engine=cache_dit", f"engine.cache.first_blocks={depth - 1}"])
    most = (depth - 1) * cut * whole.flops / (depth * evaluations)
    assert 0.5 * most < whole.flops - less.flops <= most
    assert 0 < np.abs(whole.pixels - less.pixels).mean() < 0.1
