"""Float32 arithmetic of the network and the decoder is the same, to the last bit, at 1, 2 and 4 threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import harness.engines.environment
from harness.engines.environment import arithmetic_environment, threads_per_rank
from harness.resolve.compose import compose_run

ROOT = Path(__file__).parents[3]
CODE = """
import torch
from harness.resolve.compose import compose_run
from harness.resolve.run import ResolvedRun
from harness.parallel.mesh import RankPosition
from harness.build.worker import build_worker
from harness.device.device import prepare_cpu
from models.components import Conditioning

config = compose_run(["engine.eager.modulation=false", "engine.eager.text=false"]).config
prepare_cpu(config, 1)
stages = build_worker(ResolvedRun(config), RankPosition(0, (1, 1, 1, 1, 1)), torch.device("cpu")).pipeline.stages
network, decoder = stages[4].network, stages[5].decoder
torch.manual_seed(0)
found = []
for threads in (1, 2, 4):
    prepare_cpu(config, threads)
    assert torch.get_num_threads() == threads
    torch.manual_seed(0)
    with torch.inference_mode():
        for batch in (1, 2):
            latent, text = torch.randn(batch, 4, 16, 16), torch.randn(batch, 24, 256)
            mask = torch.arange(24).expand(batch, -1) < 7
            output = network(latent, torch.full((batch,), 700.0), Conditioning(text, mask))
            found.append((threads, output, decoder(latent)))
for threads, output, pixels in found[2:]:
    reference = found[len(output) - 1]
    print(threads, len(output), torch.equal(output, reference[1]), torch.equal(pixels, reference[2]))
"""


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(2, 1, 2), (2, 2, 1), (12, 1, 8), (12, 2, 4), (3, 4, 1)])
def test_default_threads_are_a_power_of_two(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, threads: int
) -> None:
    monkeypatch.setattr(harness.engines.environment, "usable_cores", lambda: cores)
    launch = compose_run([]).config.launch
    assert threads_per_rank(launch, ranks) == threads
    launch.reproducible = False
    assert threads_per_rank(launch, ranks) == max(1, cores // ranks)
    launch.threads_per_rank = 3
    assert threads_per_rank(launch, ranks) == 3


@pytest.mark.slow
def test_network_and_decoder_are_equal_bit_for_bit_at_one_two_and_four_threads() -> None:
    environment = os.environ | arithmetic_environment(compose_run([]).config.launch, 1)
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 4
    assert all(row[2:] == ["True", "True"] for row in rows), done.stdout
