"""Sharding a denoiser's weights lowers the peak in a rank's record by the part that it does not hold."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness.config.schema import ParallelConfig
from harness.messages import GenerationRequest
from harness.resolve.compose import compose_run
from models.meta_init import build_empty
from models.pixart import PLAN, PixArt, read_config
from tests.fixtures.models.checkpoints import CASES, overrides_of
from tests.fixtures.parallel.pipelines import GenerationCase, generate_peak
from tests.fixtures.parallel.ranks import on_ranks

WIDER = {"num_layers": 16, "num_attention_heads": 12, "attention_head_dim": 64, "cross_attention_dim": 768}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be reset here"),
]


def test_a_rank_of_two_holds_half_of_the_weights_and_a_few_blocks(tmp_path: Path) -> None:
    """Return a configuration of 156 M parameters in blocks of 9 M, float32."""
    CASES["pixart_sigma"].save(tmp_path)
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | WIDER))
    config = compose_run(
        [*overrides_of(CASES["pixart_sigma"], tmp_path), "model.load=dummy", "engine.optimize=none"]
    ).config
    request = GenerationRequest("peak", prompts=["fox"], steps=1, guidance=1.0, height=32, width=32)

    def peaks_mib(sharded: bool) -> torch.Tensor:
        layout = replace(config, parallel=ParallelConfig(shard_weights=sharded))
        generation_case = GenerationCase("pixart", layout, request, (1, 1, 1, 1, 2))
        return torch.stack([found["peak_mib"] for found in on_ranks(2, generate_peak, generation_case)])

    network = build_empty(lambda: PixArt(read_config(file.parent)), torch.float32, "meta")
    (stack,) = PLAN.stacks
    parts = (network, network.get_submodule(f"{stack.blocks}.0"))
    weights, block = (sum(p.nbytes for p in part.parameters()) / 2**20 for part in parts)
    whole, sharded = peaks_mib(sharded=False), peaks_mib(sharded=True)
    print(f"weights of {weights:.0f} MiB, a block of {block:.0f}; peaks {whole.tolist()} MiB, dealt {sharded.tolist()}")
    assert whole.min() > weights
    assert weights / 2 - 5 * block < (whole - sharded).min()
    assert (whole - sharded).max() < weights / 2
