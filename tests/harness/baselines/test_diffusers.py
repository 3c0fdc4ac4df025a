"""engine=diffusers and engine=native: the same images and the same counts from the same request, family by family."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet

from harness.baselines.build import load_baseline, native_components
from harness.build.common import source_of
from harness.build.worker import build_worker
from harness.client.generator import DiffusionGenerator
from harness.engines.protocol import RequestFailed
from harness.messages import GenerationRequest, RankOutcome, decode
from harness.parallel.mesh import RankPosition
from harness.records import load
from harness.records.record import Record
from harness.resolve.compose import ConfigError, compose_run
from harness.resolve.run import ResolvedRun
from models.files import read_json
from models.names import NameMap
from models.registry import ARCHITECTURES
from tests.fixtures.generators import generator
from tests.fixtures.models.checkpoints import CASES, PROMPTS, SIZE, Case, overrides_of

BOUND = 1e-4  # of pixels in [0, 1]; both run in float32
LEARNED = ("scheduler=ddpm", "scheduler/solver=ddpm", "scheduler.solver.variance=learned_range")
OTHERS = ("dit", "sd35_medium", "flux", "qwen_image", "z_image")
SLOW = (
    "pixart_sigma",
    "sd3",
    "sd21",
    "flux",
)  # each resembles another; OTHERS serve the test of random weights


def slowly(*values: object) -> ParameterSet:
    """Return a case for the slow suite."""
    return pytest.param(*values, marks=pytest.mark.slow)


@dataclass(frozen=True)
class Pair:
    """Both engines over one checkpoint."""

    case: Case
    native: DiffusionGenerator
    peer: DiffusionGenerator

    def generate(self, **changes: Any) -> tuple[list[np.ndarray], Record, Record]:
        """Return the largest differences of pixels, which are checked to be real images, and both records."""
        requested = (
            {"prompts": PROMPTS, "negative_prompt": "blurry", "seed": 7, "steps": 3} | self.case.requested | changes
        )
        ours, theirs = self.native.generate(**requested), self.peer.generate(**requested)
        apart = []
        for mine, other in zip(ours.pixels, theirs.pixels, strict=True):
            assert mine.shape == other.shape
            assert other.std() > 0.01, "a flat picture proves nothing"
            assert ((other > 0) & (other < 1)).mean() > 0.2, "a clamped picture proves little"
            apart.append(np.abs(mine - other).max())
        return apart, ours.record, theirs.record


@pytest.fixture(scope="module", params=[slowly(name) if name in SLOW else name for name in CASES])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    case, folder = CASES[request.param], tmp_path_factory.mktemp(request.param)
    case.save(folder)
    own = overrides_of(case, folder)
    with generator(*own) as native, generator(*own, "engine=diffusers") as peer:
        yield Pair(case, native, peer)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [slowly(1), 2])
def test_guided_images_are_the_native_ones(pair: Pair, batch_size: int) -> None:
    apart, ours, theirs = pair.generate(guidance=3.5, batch_size=batch_size)
    assert max(apart) < BOUND
    assert ours.summary.nfe == theirs.summary.nfe == pair.case.evaluations
    assert [s.name for s in ours.repeats[0].steps] == [s.name for s in theirs.repeats[0].steps]
    assert len(ours.repeats[0].denoise_steps_ms) == len(theirs.repeats[0].denoise_steps_ms) == 6 // batch_size
    assert ours.repeats[0].networks_ms.keys() == theirs.repeats[0].networks_ms.keys()
    assert 0 < theirs.summary.overhead_share.median < 1


def test_images_without_guidance_are_the_native_ones(pair: Pair) -> None:
    apart, ours, theirs = pair.generate(
        guidance=1.0, negative_prompt="", prompts=pair.case.requested.get("prompts", PROMPTS)
    )
    assert max(apart) < BOUND
    assert ours.summary.nfe == theirs.summary.nfe


@pytest.mark.parametrize("pair", ["sdxl", slowly("sd35_medium"), slowly("qwen_image")], indirect=True)
def test_an_empty_negative_prompt_is_the_native_one(pair: Pair) -> None:
    """SDXL encodes an empty negative prompt as zeros."""
    apart, *_ = pair.generate(guidance=3.5, negative_prompt="")
    assert max(apart) < BOUND


def test_the_record_names_the_engine(pair: Pair) -> None:
    _, ours, theirs = pair.generate()
    assert (ours.engine.name, theirs.engine.name) == ("native", "diffusers")
    assert theirs.engine.version == theirs.provenance.packages["diffusers"]
    assert ours.fingerprint != theirs.fingerprint
    assert theirs.attention.resolved in ("diffusers sdpa", "diffusers native")
    assert {part.component for part in ours.loaded} == {part.component for part in theirs.loaded}
    old = msgspec.to_builtins(ours)
    del old["engine"]
    assert msgspec.convert(old, Record).engine.name == "native"


# ---------------------------------------------------------------- other noise schedulers and attention


def both(tmp_path: Path, name: str, *overrides: str) -> Pair:
    """Return both engines over a checkpoint of one case, not started."""
    case = CASES[name]
    case.save(tmp_path)
    own = [*overrides_of(case, tmp_path), *overrides]
    return Pair(case, generator(*own), generator(*own, "engine=diffusers"))


@pytest.mark.parametrize(
    ("name", "overrides", "evaluations"),
    [
        ("flux_schnell", ["scheduler=rectified_flow", "scheduler/solver=heun"], 5),
        slowly("wan", ["scheduler=rectified_flow", "scheduler/solver=heun"], 5),
        slowly("flux_schnell", ["scheduler=rectified_flow", "scheduler/solver=ancestral"], 3),
        slowly("sd21", ["scheduler=ddpm", "scheduler/solver=ancestral", "scheduler.clip=1.0"], 3),
        ("dit", ["scheduler=ddpm", "scheduler/solver=ddpm", "scheduler.clip=1.0"], 3),
        slowly("flux_schnell", ["attention=math"], 3),
        ("flux", ["attention=flash"], 3),
        slowly("sd21", ["attention=math"], 3),
        slowly("z_image", ["attention=flex"], 3),
    ],
    ids=str,
)
def test_our_noise_schedulers_and_kernels_run_in_their_pipelines(
    tmp_path: Path, name: str, overrides: list[str], evaluations: int
) -> None:
    """Solvers with several evaluations a step and stochastic ones get the same noise as in a native run."""
    pair = both(tmp_path, name, *overrides)
    with pair.native, pair.peer:
        apart, ours, theirs = pair.generate(guidance=2.0)
    assert max(apart) < BOUND
    assert ours.summary.nfe == theirs.summary.nfe == evaluations
    assert len(theirs.repeats[0].denoise_steps_ms) == 6


@pytest.mark.parametrize("family", [slowly("rectified_flow"), slowly("ddpm"), "sgm"])
def test_the_reference_model_runs_in_pixart_sigmas_pipeline(family: str) -> None:
    own = ("model=emoji", f"scheduler={family}")
    case = Case("emoji", lambda folder: None, own, {"prompts": ["red apple", "rocket, 3d"]})
    with generator(*own) as native, generator(*own, "engine=diffusers") as peer:
        apart, _, theirs = Pair(case, native, peer).generate(guidance=3.0, batch_size=2, steps=2)
    assert max(apart) < BOUND
    assert theirs.quality is not None


@pytest.mark.slow
def test_steps_whose_noise_is_diffusers_own_are_noted(tmp_path: Path) -> None:
    """A checkpoint's own class generates its own noise; ours would have to replace it."""
    CASES["sd21"].save(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(read_json(file) | {"_class_name": "DDPMScheduler"}))
    own = overrides_of(CASES["sd21"], tmp_path)
    with generator(*own, "engine=diffusers") as peer:
        record = peer.generate(prompt="a", seed=1, steps=2, **SIZE).record
        assert any("the noise of each step is diffusers' own" in note for note in record.notes)


# ---------------------------------------------------------------- random weights


@pytest.mark.parametrize("name", ["pixart_alpha", "wan", "sd15", *map(slowly, OTHERS)])
def test_random_weights_are_the_native_ones(tmp_path: Path, name: str) -> None:
    """The denoiser holds the same numbers, name by name, in the dtypes of a bfloat16 network."""
    case = CASES[name]
    case.save(tmp_path)
    config = compose_run([*overrides_of(case, tmp_path), "model.load=dummy", "model.dtype=bfloat16"]).config
    source, architecture = source_of(ResolvedRun(config), torch.device("cpu")), config.model.architecture
    native = importlib.import_module(ARCHITECTURES[architecture].module).load_denoiser(source)
    peer = load_baseline(architecture, source, native_components(architecture, source)).network
    if architecture == "sd":
        names, native = NameMap(), native.unet
    else:
        names = importlib.import_module(f"models.{architecture}.weights").NAMES
    theirs = dict(peer.named_parameters())
    assert theirs.keys() == {names.to_published(key) for key, _ in native.named_parameters()}
    for key, parameter in native.named_parameters():
        assert torch.equal(parameter, theirs[names.to_published(key)]), key
        assert parameter.dtype == theirs[names.to_published(key)].dtype, key


@pytest.mark.slow
def test_images_of_random_weights_are_the_native_ones(tmp_path: Path) -> None:
    pair = both(tmp_path, "sd35_medium", "model.load=dummy")
    with pair.native, pair.peer:
        apart, *_ = pair.generate(guidance=2.0)
    assert max(apart) < BOUND


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine=diffusers", "parallel=dp2"], "does not go with parallel.dp=2; use parallel=single"),
        (
            ["engine=diffusers", "model=ddpm_cifar10", "model.load=dummy"],
            "with model=ddpm_cifar10: it runs dit, .*; use",
        ),
        (["engine=diffusers", "attention=flex"], "attention=flex does not run.*choose auto, sdpa, math"),
        (
            ["engine=diffusers", "task.fidelity_per_step=true"],
            "it does not provide the state after every step",
        ),
        (["engine=diffusers", "scheduler/solver=rk45"], "rk45 chooses its timesteps by the image"),
        (["engine=diffusers", "request.guidance=0.5"], "guides above 1 only"),
        (["engine=diffusers", "model=flux", "model.load=dummy", "scheduler=ddpm"], "scheduler=ddpm does not fit"),
        (
            ["engine=diffusers", "model=dit_256", "model.load=dummy", *LEARNED],
            "drop the learned variance",
        ),
        (
            ["engine=diffusers", "model=dit_256", "model.load=dummy", "request.negative_prompt=cock"],
            "has no negative class",
        ),
        (
            ["engine.name=diffuser"],
            "engine.name=diffuser is not one of native, diffusers, cache_dit, sglang; did you mean diffusers?",
        ),
    ],
    ids=str,
)
def test_what_a_baseline_engine_cannot_run_is_refused_before_it_starts(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_run(overrides)


def test_what_has_no_effect_is_reported() -> None:
    notes = compose_run(["engine=diffusers", "model.text.keep_loaded=false"]).notes
    assert notes == ["model.text.keep_loaded=false has no effect with engine=diffusers"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dit", {"height": 24}, "DiTPipeline generates 16 x 16"),
        ("sd21", {"guidance": 0.5}, "guides above 1 only"),
    ],
)
def test_what_a_pipeline_cannot_generate_is_rejected(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    CASES[name].save(tmp_path)
    requested = {"prompts": PROMPTS, "seed": 1, "steps": 1} | CASES[name].requested | changes
    with generator(*overrides_of(CASES[name], tmp_path), "engine=diffusers") as peer:
        with pytest.raises(RequestFailed, match=message) as caught:
            peer.generate(**requested)
        assert caught.value.kind == "rejected"


def test_a_cancelled_request_ends_at_the_next_step_and_leaves_no_hook(tmp_path: Path) -> None:
    case = CASES["sd21"]
    case.save(tmp_path)
    config = compose_run([*overrides_of(case, tmp_path), "engine=diffusers"]).config
    worker = build_worker(ResolvedRun(config), RankPosition(0, [1, 1, 1, 1, 1]), torch.device("cpu"))
    steps: list[int] = []
    request = GenerationRequest("r", ["a"], 5, 2.0, 48, 32)

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "denoising" and total:
            steps.append(done)

    failed = decode(worker.generate(request, on_progress, lambda: len(steps) == 2))
    assert isinstance(failed, RankOutcome)
    assert failed.failure is not None
    assert failed.failure.kind == "cancelled"
    assert steps == [1, 2]
    answer = decode(worker.generate(request, on_progress, lambda: False))
    assert isinstance(answer, RankOutcome)
    assert answer.report is not None
    assert len(answer.report.denoise_steps_ms) == answer.report.network_evaluations["denoiser"] == 5


@pytest.mark.slow
def test_a_rank_under_torchrun_runs_diffusers(tmp_path: Path) -> None:
    """A sweep over both engines from the command line gives two rows of one table."""
    command = [sys.executable, "-m", "harness", "-m", "engine=native,diffusers", "request.steps=2", "logger=json"]
    command += ["request.prompt=rocket", f"hydra.sweep.dir={tmp_path}"]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    table = load(tmp_path)
    assert sorted(table["engine.name"]) == ["diffusers", "native"]
    assert list(table["state"]) == ["ok", "ok"]
    assert list(table["summary.nfe"]) == [2, 2]
