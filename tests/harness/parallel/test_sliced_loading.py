"""A rank that reads only its slices of a checkpoint holds what slicing the whole network leaves it, bit for bit."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.parallel.group import Group
from harness.parallel.parallelize import shard_linears
from models.attention import math_attention
from models.checkpoint_source import CheckpointSource, LoraFile
from tests.fixtures.parallel.networks import TINY
from tests.fixtures.parallel.slices import group_of, load, names_of, saved


def assert_slices(name: str, source: CheckpointSource, group: Group) -> None:
    """Compare the slices that are read with those taken from the whole network."""
    sliced = load(name, replace(source, shard_network=partial(shard_linears, group=group), loaded={}))
    whole = load(name, source)
    parts = shard_linears(whole, TINY[name].plan, group)
    assert parts
    expected, found = whole.state_dict(), sliced.state_dict()
    assert [(key, x.dtype, x.shape) for key, x in found.items()] == [
        (key, x.dtype, x.shape) for key, x in expected.items()
    ]
    assert [key for key, x in found.items() if not torch.equal(x, expected[key])] == []
    assert [str(module) for module in sliced.modules()] == [str(module) for module in whole.modules()]


@pytest.mark.parametrize("name", TINY)
def test_slices_of_a_checkpoint_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    for size, rank in ((2, 0), (2, 1), (TINY[name].heads(), 3)):
        for dtype in (torch.float32, torch.bfloat16):
            assert_slices(name, CheckpointSource(tmp_path, dtype=dtype), group_of(size, rank))


@pytest.mark.parametrize("name", TINY)
def test_slices_of_random_weights_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    assert_slices(name, CheckpointSource(tmp_path, dummy=True), group_of(2, 1))


@pytest.mark.parametrize("layer", ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_out"])
def test_slices_with_a_lora_are_those_of_the_whole(layer: str, tmp_path: Path) -> None:
    out, into = saved("flux", tmp_path)[f"{layer}.weight"].shape
    matrices = {"lora_A": torch.randn(3, into), "lora_B": torch.randn(out, 3)}
    file = tmp_path / "lora.safetensors"
    save_file({f"transformer.{layer}.{key}.weight": x for key, x in matrices.items()}, file)
    source = CheckpointSource(tmp_path, loras=(LoraFile(file, 0.5),))
    assert_slices("flux", source, group_of(2, 1))
    assert source.loaded["transformer"].merged == 1


def test_a_rank_reads_its_slices_and_what_is_not_sharded(tmp_path: Path) -> None:
    tensors = saved("flux", tmp_path)
    total = sum(x.numel() * 4 for x in tensors.values())
    whole = CheckpointSource(tmp_path)
    load("flux", whole)
    assert whole.loaded["transformer"].read_bytes == total
    halves = []
    for rank in range(2):
        source = CheckpointSource(
            tmp_path, dtype=torch.bfloat16, shard_network=partial(shard_linears, group=group_of(2, rank))
        )
        held = sum(x.numel() for x in load("flux", source).state_dict().values())
        halves.append(source.loaded["transformer"])
        assert halves[-1].read_bytes == held * 4
        assert halves[-1].bytes == held * 2
    parts = shard_linears(TINY["flux"].build(math_attention), TINY["flux"].plan, group_of(2, 0))
    shard_network = sum(tensors[names_of("flux").to_published(name)].numel() * 4 for name in parts)
    assert [half.read_bytes for half in halves] == [total - shard_network // 2] * 2
