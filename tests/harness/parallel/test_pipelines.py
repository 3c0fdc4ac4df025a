"""Whole pipelines, from prompts to pixels, generate at every layout what one rank generates, for every family."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from diffusers import AutoencoderKLWan

from harness.config.optimize import Optimize
from harness.config.schema import Decode, EngineConfig, ParallelConfig, RunConfig
from harness.costs.frames_traffic import frames_bytes, trace_frames
from harness.messages import GenerationRequest
from harness.parallel.mesh import world_size
from harness.resolve.compose import compose_run
from models.wan.decoder import WanDecoder
from tests.fixtures.models.checkpoints import CASES, overrides_of
from tests.fixtures.models.parity import rel_l2
from tests.fixtures.parallel.pipelines import Degrees, GenerationCase, generate, generate_counted
from tests.fixtures.parallel.ranks import on_ranks, on_worlds

BOUND = 1e-5  # relative L2 of latents and of pixels, in float32
ONE_RANK = (1, 1, 1, 1, 1)
PROMPTS = ["fox", "a red apple under a blue sky", "two boats"]  # in batches of two: one of them holds a single image
LOW = {"height": 36, "width": 20}


@dataclass(frozen=True)
class Family:
    """A checkpoint and its request: 9 rows of 5 tokens, which 8 ranks can share and none divides.

    Args:
        heads: The number of attention heads, no fewer than 8 ranks; None for a UNet.
        branches: The number of guidance branches.
        asked: The fields of a request.
    """

    heads: int | None
    branches: int = 2
    requested: dict[str, Any] = field(default_factory=lambda: LOW)

    def fits(self, layout: Degrees) -> bool:
        """Return whether the layout fits the checkpoint."""
        _, cfg, tp, ring, ulysses = layout
        if self.heads is None:
            return tp * ring * ulysses == 1
        return cfg <= self.branches and self.heads % tp == 0 and ulysses <= self.heads // tp


FAMILIES = {
    "emoji": Family(8, requested={"height": 72, "width": 40, "prompts": ["rocket", "red apple, 3d", "pizza"]}),
    "dit": Family(12, requested=LOW | {"prompts": ["cock", "999", "goldfish"]}),
    "pixart_sigma": Family(12),
    "sd35_medium": Family(12),
    "flux": Family(12, branches=1),
    "flux_schnell": Family(10),
    "qwen_image": Family(12, requested={"height": 72, "width": 40}),
    "z_image": Family(10),
    "wan": Family(10, requested={"height": 72, "width": 40, "frames": 5}),
    "sd15": Family(None, requested={"height": 72, "width": 40}),
    "sdxl": Family(None, requested={"height": 72, "width": 40}),
}
FEW = {
    2: ((2, 1, 1, 1, 1), (1, 2, 1, 1, 1), (1, 1, 2, 1, 1), (1, 1, 1, 2, 1), (1, 1, 1, 1, 2)),
    4: ((1, 2, 1, 1, 2), (1, 1, 2, 2, 1)),
}
"""Layouts of the default suite by world size: every axis, and two products."""

MORE = {
    2: FEW[2],
    3: ((3, 1, 1, 1, 1), (1, 1, 3, 1, 1), (1, 1, 1, 3, 1), (1, 1, 1, 1, 3)),
    4: (
        (2, 2, 1, 1, 1),
        (1, 2, 2, 1, 1),
        (1, 2, 1, 2, 1),
        (1, 2, 1, 1, 2),
        (1, 1, 2, 2, 1),
        (1, 1, 2, 1, 2),
        (1, 1, 1, 2, 2),
        (1, 1, 1, 1, 4),
    ),
    8: (
        (2, 2, 1, 1, 2),
        (1, 2, 2, 2, 1),
        (1, 2, 1, 2, 2),
        (1, 1, 1, 4, 2),
    ),
}
"""Layouts of the slow suite; tests/fixtures/parallel/layouts.py has the networks alone under every product."""

Load = Callable[[str], tuple[RunConfig, GenerationRequest]]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Return a function from a family's name to its saved checkpoint's configuration and the request."""

    @cache
    def one(name: str) -> tuple[RunConfig, GenerationRequest]:
        family, overrides = FAMILIES[name], ["model=emoji"]
        if name in CASES:
            folder, case = tmp_path_factory.mktemp(name), CASES[name]
            sizes = {} if family.heads is None else {"heads": family.heads}
            case.save(folder, **sizes)
            overrides = overrides_of(case, folder)
        requested = {"prompts": PROMPTS, "negative_prompt": "" if name == "dit" else "blurry"} | family.requested
        request = GenerationRequest(name, steps=2, guidance=3.5, seed=7, batch_size=2, latents="last", **requested)
        return compose_run([*overrides, "engine.optimize=none"]).config, request

    return one


def assert_one_rank(
    load: Load, names: Sequence[str], layouts: Sequence[Degrees], optimize: Optimize = Optimize.none
) -> None:
    """These families generate one plain rank's latents and pixels, optimised or not; replicas bit for bit."""
    ranks = world_size(layouts[0])
    alone = {name: GenerationCase(name, *load(name), ONE_RANK) for name in names}
    engine = EngineConfig(optimize=optimize)
    requested = {name: (replace(config, engine=engine), request) for name in names for config, request in [load(name)]}
    sharded = [
        GenerationCase(name, *requested[name], layout)
        for name in names
        for layout in layouts
        if FAMILIES[name].fits(layout)
    ]
    (wanted,) = on_worlds(1, generate, [(generation_case,) for generation_case in alone.values()])
    found = {
        name: x
        for one in on_worlds(ranks, generate, [(generation_case,) for generation_case in sharded])
        for name, x in one.items()
    }
    for generation_case in sharded:
        for what in (f"{kind} {k}" for k in range(len(PROMPTS)) for kind in ("latent", "pixels")):
            ours, theirs = found.pop(f"{generation_case} {what}"), wanted[f"{alone[generation_case.name]} {what}"]
            assert theirs.std() > 0.01, f"{generation_case} {what}: flat, which proves nothing"
            error = rel_l2(ours, theirs)
            assert error <= BOUND, f"{generation_case} {what}: relative L2 {error:.1e}"
            exact = optimize is Optimize.none and generation_case.degrees[0] == ranks
            assert torch.equal(ours, theirs) or not exact, f"{generation_case} {what}: replicas differ"
    assert not found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_joint_attention_and_a_video_generate_what_one_rank_generates(load: Load, ranks: int) -> None:
    assert_one_rank(load, ("sd35_medium", "wan"), FEW[ranks])


@pytest.mark.slow
def test_what_is_optimised_generates_what_one_plain_rank_generates(load: Load) -> None:
    assert_one_rank(load, ("wan", "z_image"), FEW[2][2:], Optimize.eager)


@pytest.mark.slow
def test_a_video_decoded_by_frames_is_what_one_rank_generates(load: Load) -> None:
    config, requested = load("wan")
    by_frames = replace(config, parallel=ParallelConfig(decode=Decode.frames))
    requested = msgspec.structs.replace(requested, frames=17, prompts=PROMPTS[:2])  # 5 latent frames: 3 and 2
    alone, sharded = (
        GenerationCase("wan", config, requested, ONE_RANK),
        GenerationCase("wan", by_frames, requested, (1, 2, 1, 1, 1)),
    )
    (wanted,), (found, _) = on_ranks(1, generate, alone), on_ranks(2, generate_counted, sharded)
    for k in range(2):
        theirs = wanted[f"{alone} pixels {k}"]
        assert theirs.shape[0] == 17
        assert theirs.std() > 0.01
        assert rel_l2(found[f"{sharded} pixels {k}"], theirs) <= BOUND
    vae = AutoencoderKLWan.load_config(Path(str(config.model.path)) / "vae")
    latents = torch.empty(2, 4, 5, requested.height // 4, requested.width // 4)
    trace = trace_frames(lambda: WanDecoder(AutoencoderKLWan.from_config(vae)), latents)
    said = frames_bytes(trace, ranks=2, index=0, itemsize=4)
    assert said == {kind: int(found[kind]) for kind in said}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", list(MORE))
def test_every_family_generates_what_one_rank_generates(load: Load, ranks: int) -> None:
    assert_one_rank(load, list(FAMILIES), MORE[ranks])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_optimised_family_generates_what_one_plain_rank_generates(load: Load, ranks: int) -> None:
    layouts = {1: (ONE_RANK,), **MORE}[ranks]
    assert_one_rank(load, list(FAMILIES), layouts, Optimize.eager)
