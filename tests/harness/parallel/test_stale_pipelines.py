"""Whole pipelines with stale keys and values: one rank's images if all evaluations are exact, other images if not."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from harness.config.schema import ParallelConfig, RunConfig
from harness.costs.traffic import pipe_bytes, sent_bytes, trace_network
from harness.messages import GenerationRequest
from harness.resolve.compose import compose_run
from models.components import Conditioning
from models.pixart import PLAN, PixArt, read_config
from models.registry import REFERENCE
from tests.fixtures.models.checkpoints import CASES, overrides_of
from tests.fixtures.models.parity import rel_l2
from tests.fixtures.parallel.pipelines import GenerationCase, generate, generate_stale
from tests.fixtures.parallel.ranks import on_ranks, on_worlds
from tests.fixtures.parallel.stale import stored_elements

STEPS = 3
LAYOUTS = {
    "displaced": (ParallelConfig(displaced=True), (1, 1, 1, 2, 1)),
    "pipe": (ParallelConfig(pipe=2, patches=3), (1, 1, 1, 1, 1)),
}
REQUESTED = GenerationRequest(
    "stale",
    prompts=["rocket", "pizza"],
    steps=STEPS,
    guidance=3.0,
    seed=7,
    batch_size=1,
    height=40,
    width=32,
    latents="last",
)


def sharded_case(
    config: RunConfig, layout: str, warmup: int, requested: GenerationRequest = REQUESTED
) -> GenerationCase:
    parallel, degrees = LAYOUTS[layout]
    return GenerationCase("of", replace(config, parallel=replace(parallel, warmup=warmup)), requested, degrees)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_are_those_of_one_rank_where_all_is_exact_and_records_say_what_was_kept(layout: str) -> None:
    config = compose_run(["model=emoji", "engine.optimize=none"]).config
    (alone,) = on_ranks(1, generate, GenerationCase("of", config, REQUESTED, (1, 1, 1, 1, 1)))
    trace = trace_network(
        lambda: PixArt(replace(read_config(REFERENCE / "emoji" / "transformer"), stride=4)),
        PLAN,
        (torch.empty(2, 4, 10, 8), torch.empty(2), Conditioning(torch.empty(2, 24, 256))),
    )
    for warmup in (1, STEPS):
        for rank, found in enumerate(on_ranks(2, generate_stale, sharded_case(config, layout, warmup))):
            said = pipe_bytes(trace, PLAN, 2, rank, 4)
            kept = stored_elements(trace, (1, 1, 1, 1, 1)) // 2  # half of the blocks
            if layout == "displaced":
                said = sent_bytes(trace, (1, 1, 1, 2, 1), 4, displaced=True)
                kept = stored_elements(trace, (1, 1, 1, 2, 1))
            exact, evaluations, kept_mib = found.pop("numbers").tolist()
            assert (exact, evaluations) == (warmup, STEPS)
            assert kept_mib == pytest.approx(4 * kept / 2**20, abs=0.005)
            sent = {kind: int(x) for kind, x in found.items() if not kind.startswith("of") and x}
            assert sent == {kind: 2 * STEPS * count for kind, count in said.items()}
            for name, x in ((name, x) for name, x in found.items() if "latent" in name):
                error = rel_l2(x, alone[f"of 1x1x1x1x1 {name.split(' ', 2)[2]}"])
                assert (error < 1e-5) == (warmup == STEPS), (rank, name, error)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "pixart_sigma", "sd35_medium", "flux", "qwen_image", "z_image", "wan"])
def test_every_family_generates_what_one_rank_generates(name: str, tmp_path: Path) -> None:
    CASES[name].save(tmp_path)
    config = compose_run([*overrides_of(CASES[name], tmp_path), "engine.optimize=none"]).config
    prompts = ["cock", "999"] if name == "dit" else ["fox", "two boats"]
    requested = msgspec.structs.replace(REQUESTED, prompts=prompts, height=36, width=20)
    if name in ("qwen_image", "wan"):
        requested = msgspec.structs.replace(requested, height=72, width=40, frames=5 if name == "wan" else 1)
    (alone,) = on_ranks(1, generate, GenerationCase("of", config, requested, (1, 1, 1, 1, 1)))
    for layout in LAYOUTS:
        exact, stale = (
            on_worlds(2, generate, [(sharded_case(config, layout, warmup, requested),)])[0] for warmup in (STEPS, 1)
        )
        for key, x in exact.items():
            theirs = alone[f"of 1x1x1x1x1 {key.split(' ', 2)[2]}"]
            assert theirs.std() > 0.01
            assert rel_l2(x, theirs) < 1e-5, (layout, key)
            assert 1e-5 < rel_l2(stale[key], theirs) < 0.5, (layout, key)
