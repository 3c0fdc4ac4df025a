"""engine=sglang: SGLang-Diffusion's own network and loop generate what engine=diffusers generates, family by family."""

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from safetensors.torch import save_file

from harness.baselines.build import load_baseline, load_sglang, native_components
from harness.baselines.noise_scheduler import published_scheduler
from harness.build.common import source_of
from harness.resolve.compose import ConfigError, compose_run
from harness.resolve.engines_table import BASELINES
from harness.tasks.common.methods import method_class
from models.files import CheckpointError
from tests.fixtures.generators import generator
from tests.fixtures.models.checkpoints import CASES, PROMPTS, overrides_of
from tests.fixtures.packages import pretend

FIND = importlib.util.find_spec
BOUND = 1e-4  # relative L2 of latents in float32
FAMILIES = ["flux", "flux_schnell", "sd3", "sd35_medium", "z_image"]


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "sglang", None)
    with pytest.raises(ConfigError, match=r"^engine=sglang needs the package sglang: pip install --no-deps sglang"):
        compose_run(["engine=sglang"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=wan_1_3b"], "does not go with model=wan_1_3b: it runs sd3, flux, z_image; use engine=native"),
        ([], "does not go with model=emoji: it runs sd3"),
        (["model=flux", "parallel=dp2"], "does not go with parallel.dp=2; use parallel=single"),
        (["model=flux", "engine.optimize=compile"], "engine.optimize=compile does not go with engine=sglang"),
        (
            ["model=z_image_turbo", "attention=flash"],
            "does not run in SGLang-Diffusion's network of model=z_image_turb",
        ),
        (
            ["model=flux", "task.fidelity_per_step=true"],
            "it does not provide the state after every step",
        ),
    ],
    ids=str,
)
def test_what_it_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str) -> None:
    pretend(monkeypatch, "sglang", object())
    with pytest.raises(ConfigError, match=message):
        compose_run(["engine=sglang", "model.load=dummy", *overrides])


@pytest.mark.parametrize(("dtype", "claimed"), [("float32", "fp_equivalent"), ("bfloat16", "approximate")])
def test_it_claims_what_a_baseline_engine_claims(monkeypatch: pytest.MonkeyPatch, dtype: str, claimed: str) -> None:
    pretend(monkeypatch, "sglang", object())
    config = compose_run(["engine=sglang", "model=flux_160m", f"model.dtype={dtype}"]).config
    assert method_class(config)[0] == claimed


def test_what_it_cannot_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DIFFUSION_PLATFORM_OVERRIDE", "cpu")
    monkeypatch.setitem(sys.modules, "sglang", None)
    monkeypatch.delitem(sys.modules, "harness.baselines.sglang", raising=False)
    CASES["sd3"].save(tmp_path)
    source = source_of(compose_run(overrides_of(CASES["sd3"], tmp_path)), torch.device("cpu"))
    parts, row, slot = native_components("sd3", source), BASELINES["sd3"].sglang, published_scheduler(source)
    assert row is not None
    with pytest.raises(ValueError, match=r"^engine=sglang cannot import SGLang \(.*sglang.*; install what is named"):
        load_sglang(load_baseline("sd3", source, parts), row, source, parts, slot)


# ---------------------------------------------------------------- with the package

installed = pytest.mark.skipif(FIND("sglang") is None, reason="sglang is not installed")
"""Look for the package without importing it, which takes half a minute; all tests with it are slow."""


def apart(folder: Path, name: str, overrides: list[str], requested: dict[str, object]) -> float:
    """Return the largest relative L2 between both engines' latents, which are checked to do the same work."""
    own, requested = [*overrides_of(CASES[name], folder), *overrides], CASES[name].requested | requested
    with generator(*own, "engine=diffusers") as theirs, generator(*own, "engine=sglang") as sglang:
        expected, found = (
            engine.generate(prompts=PROMPTS, seed=7, latents="last", **requested) for engine in (theirs, sglang)
        )
        assert found.record.engine.name == "sglang"
        assert found.record.engine.version
        assert found.record.attention.resolved.startswith("sglang sdpa")
        assert any("those of SGLang-Diffusion" in note for note in found.record.notes)
        assert {part.component for part in expected.record.loaded} == {part.component for part in found.record.loaded}
        merged = [[part.merged for part in generated.record.loaded] for generated in (expected, found)]
        assert sorted(merged[0]) == sorted(merged[1])
        assert expected.record.summary.nfe == found.record.summary.nfe
        assert len(expected.record.repeats[0].denoise_steps_ms) == len(found.record.repeats[0].denoise_steps_ms)
    for image in found.pixels:
        assert image.std() > 0.01, "a flat picture proves nothing"
    pairs = zip(expected.latents, found.latents, strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs)


@installed
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(("guidance", "negative"), [(3.5, "blurry"), (1.0, "")], ids=["guided", "plain"])
def test_images_are_those_of_diffusers(
    tmp_path: Path, name: str, batch_size: int, guidance: float, negative: str
) -> None:
    CASES[name].save(tmp_path)
    requested = {"guidance": guidance, "negative_prompt": negative, "batch_size": batch_size, "steps": 3}
    assert apart(tmp_path, name, [], requested) < BOUND


@installed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("flux", ["model.load=dummy"]),
        ("z_image", ["attention=math"]),
        ("sd3", ["attention=flash"]),
        ("flux_schnell", ["scheduler=rectified_flow", "scheduler/solver=heun"]),
    ],
    ids=str,
)
def test_random_weights_kernels_and_our_noise_schedulers(tmp_path: Path, name: str, overrides: list[str]) -> None:
    CASES[name].save(tmp_path)
    assert apart(tmp_path, name, overrides, {"guidance": 2.0, "steps": 3, "batch_size": 2}) < BOUND


@installed
@pytest.mark.slow
def test_merged_updates_reach_its_network(tmp_path: Path) -> None:
    CASES["flux"].save(tmp_path)
    layer, width = "transformer.transformer_blocks.0.attn.to_q", 32
    update = {f"{layer}.lora_A.weight": torch.randn(4, width), f"{layer}.lora_B.weight": torch.randn(width, 4)}
    save_file(update, tmp_path / "update.safetensors")
    assert apart(tmp_path, "flux", [f"model.lora=[{{path: {tmp_path / 'update.safetensors'}}}]"], {"steps": 2}) < BOUND


@installed
@pytest.mark.slow
def test_nothing_of_diffusers_network_is_left_and_a_failure_is_no_fall_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its own names for a few keys, SGLang builds the published Z-Image, which does not fit these weights."""
    CASES["z_image"].save(tmp_path)
    source = source_of(compose_run(overrides_of(CASES["z_image"], tmp_path)), torch.device("cpu"))
    parts, row, slot = native_components("z_image", source), BASELINES["z_image"].sglang, published_scheduler(source)
    assert row is not None
    theirs = load_baseline("z_image", source, parts)
    found = load_sglang(theirs, row, source, parts, slot)
    assert type(found.network).__module__ == "sglang.multimodal_gen.runtime.models.dits.zimage"
    assert sum(parameter.numel() for parameter in theirs.network.parameters()) == 0
    with pytest.raises(CheckpointError, match=r"SGLang-Diffusion cannot load transformer by itself.*engine=diffusers"):
        load_sglang(load_baseline("z_image", source, parts), replace(row, renamed={}), source, parts, slot)


@installed
@pytest.mark.slow
def test_a_noise_scheduler_that_it_lacks_is_refused() -> None:
    sglang = importlib.import_module("harness.baselines.sglang")
    with pytest.raises(ValueError, match=r"SGLang-Diffusion has no FlowMatchHeunDiscreteScheduler.*rectified_flow"):
        sglang.own(FlowMatchHeunDiscreteScheduler())
