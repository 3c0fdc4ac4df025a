"""Every config composes and validates; what cannot run is refused in one line that says what to change."""

import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import conf
from harness.config.engines import ENGINES
from harness.config.schema import DType, LoraConfig, RunConfig
from harness.config.yaml import from_dict, to_dict
from harness.records.provenance import version
from harness.resolve.checkpoint_defaults import denoiser_defaults
from harness.resolve.compose import ConfigError, ResolvedRun, compose_run, from_yaml, to_yaml
from harness.resolve.limits import check_frames
from harness.resolve.names import REMOVED, check_names, config_groups
from harness.tasks import task_entry
from models.registry import REFERENCE, missing_package
from schedulers.settings import TrainingSettings

CHECKPOINT = REFERENCE / "emoji"
OPTIONS = [(group, option) for group, options in config_groups().items() for option in options]
NEEDS = {
    ("engine", "sglang"): ["model=z_image_110m"],
    ("scheduler/solver", "edm_churn"): ["scheduler=sgm"],
    ("scheduler/solver", "euler_maruyama"): ["scheduler=sgm"],
    ("scheduler/solver", "pndm"): ["scheduler=ddpm"],
    ("scheduler/solver", "tcd"): ["scheduler=ddpm"],
    ("task", "compare"): ["compare.a=[]", "compare.b=[]"],
    ("task", "report"): ["report.runs=runs"],
}


def compose(*overrides: str) -> ResolvedRun:
    return compose_run(overrides)


def compose_and_check(*overrides: str) -> None:
    run = compose(*overrides)
    task_entry(run.config.task.name).check(run)


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_and_check(*overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.slow
@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    if group == "attention" and missing_package(option):
        assert "pip install" in refused(f"attention={option}")
        return
    if group == "engine" and ENGINES[option].install and version(option) is None:
        assert "pip install" in refused(f"engine={option}")
        return
    if group == "hydra/launcher" and version("hydra-submitit-launcher") is None:
        assert "pip install 'triptych[slurm]'" in refused(f"{group}={option}")
        return
    if group == "dataset" and option != "none":
        assert "dataset.file=" in refused(f"dataset={option}")
        return
    unshipped = ["model.load=dummy"] if group == "model" and not (REFERENCE / option).is_dir() else []
    composed = compose(f"{group}={option}", *unshipped, *NEEDS.get((group, option), []))
    assert composed.notes == []
    assert from_yaml(to_yaml(composed.config)) == composed.config


def test_groups_are_the_replaceable_objects() -> None:
    assert {"task", "engine", "model", "scheduler", "parallel", "attention", "hardware", "logger", "experiment"} <= set(
        config_groups()
    )


def test_the_model_fills_in_what_the_request_leaves_open() -> None:
    request = compose("model.steps=11", "model.guidance=2.5").config.request
    assert (request.steps, request.guidance, request.height, request.width) == (11, 2.5, 64, 64)
    assert compose("request.prompt=rocket").config.request.prompts == ["rocket"]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("schedulr=ddpm", "did you mean scheduler?"),
        ("scheduler=dppm", "did you mean ddpm?"),
        ("scheduler/solver=hen", "did you mean heun?"),
        ("attention=flsh", "did you mean flash?"),
        ("request.stpes=4", "did you mean request.steps?"),
        ("steps=4", "did you mean request.steps?"),
        ("model.dtpye=float32", "did you mean model.dtype?"),
        ("request.steps=many", "could not be converted to Integer"),
        ("model.dtype=float16", "expected one of [float32, bfloat16]"),
        ("request.steps=0", "give 1 to 10000"),
        ("request.height=65", "64 or 72"),
        ("request.width=3", "can make is 8"),
        ("request.guidance=-1", "give 0 to 1000"),
        ("request.seed=-1", "give 0 to"),
        ("request.batch_size=0", "give 1 to 4096"),
        ("request.samples_per_prompt=0", "give 1 to 4096"),
        ("request.samples_per_prompt=100000", "give 1 to 4096"),
        ("request.height=8192", "height * width may be at most"),
        ("parallel.dp=0", "give 1 to 1024"),
        ("parallel.ulysses=16", "use parallel.ulysses=8 or fewer"),
        ("parallel.tp=3", "the nearest that does is parallel.tp=2"),
        ("parallel.cfg=3", "give 1 or 2"),
        ("parallel.ring=128", "use 64 ranks or fewer"),
        ("parallel.ring=16", "use 8 ranks or fewer per image"),
        ("model.checkpoint_defaults.dppm.weights=a", "did you mean model.checkpoint_defaults.ddpm.weights?"),
        ("model.checkpoint_defaults.ddpm.weigths=a", "did you mean model.checkpoint_defaults.ddpm.weights?"),
        ("prediction=v", "did you mean scheduler.prediction?"),
        ("model.architecture=pixar", "did you mean pixart"),
        ("launch.threads_per_rank=0", "give 1 to 1024"),
        ("launch.collective_timeout_s=0", "give 1 to 86400 s"),
        ("request.frames=5", "this model makes images"),
        ("model.text.tokens=0", "give 1 to 4096"),
        ("task.repeats=0", "give 1 to 100000"),
        ("hardware=h100sxm", "did you mean h100_sxm?"),
        ("request.prompt=a=b", "write 'request.prompt=\"a=b\"'"),
        ("request.prompt=red apple, 3d", "'request.prompt=\"red apple, 3d\"'"),
        ("model.path=/no/such/folder", "no such folder"),
    ],
)
def test_what_cannot_run_is_refused_with_what_to_change(override: str, hint: str) -> None:
    assert hint in refused(override)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("plan.ranks=0", "give 1 to 1024"),
        ("plan.rows=0", "give 1 to 10000"),
        ("plan.runs=/no/such/folder", "no such folder"),
        ("hardware.link_gb_s=-1", "give more than 0"),
        ("hardware.compute_share=60", "give more than 0 and at most 1"),
        ("hardware.network_gb_s=null plan.ranks=9", "use plan.ranks=8 or fewer"),
    ],
)
def test_what_cannot_be_planned_is_refused(override: str, hint: str) -> None:
    assert hint in refused("task=plan", *override.split())


@pytest.mark.parametrize(("old", "new"), REMOVED.items())
def test_a_removed_key_names_its_successor(old: str, new: str) -> None:
    assert f"{old} is now {new}; use that" in refused(f"{old}=[x=1]")


def test_a_key_below_a_removed_one_names_its_successor() -> None:
    old = next(old for old, new in REMOVED.items() if new == "model.checkpoint_defaults")
    for written in (f"{old}.ddpm.weights=transformer", f"+{old}.ddpm.weights=transformer", f"~{old}.ddpm.weights"):
        assert refused(written) == f"{old}.ddpm.weights is now model.checkpoint_defaults.ddpm.weights; use that"


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["report.runs=runs"], "report.runs has an effect with task=report only"),
        (["report.out=page.html"], "report.out has an effect with task=report only"),
        (["plan.runs=runs"], "plan.runs has an effect with task=plan only"),
        (["task=report", "report.runs=runs", "plan.runs=runs"], "plan.runs has an effect with task=plan only"),
    ],
)
def test_a_tree_of_runs_in_another_task_is_refused(overrides: list[str], hint: str) -> None:
    assert hint in refused(*overrides)


def test_a_plan_reads_no_weights_and_lists_every_layout() -> None:
    composed = compose("task=plan", "model=flux", "parallel=ulysses2")
    assert composed.notes == ["parallel has no effect with task=plan, which lists every layout"]


def test_combinations_are_refused() -> None:
    assert "not both" in refused("request.prompt=a", "request.prompts=[a]")
    assert "use launch.mode=torchrun" in refused("parallel=dp2", "launch.mode=inprocess")


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        (["scheduler=ddpm"], 1000),
        (["scheduler=ddpm", "scheduler.spacing=trailing"], 1000),
        (["scheduler=ddpm", "scheduler.train_steps=50"], 50),
        (["scheduler=ddpm", "scheduler.spacing=leading", "scheduler.steps_offset=1"], 999),
        (["scheduler=ddpm", "scheduler.spacing=leading", "scheduler.spare_row=true"], 999),
        (["scheduler=ddpm", "scheduler.spacing=lcm"], 50),
        (["model=sdxl"], 1000),
        (["model=sd21"], 999),
    ],
)
def test_more_steps_than_timesteps_are_refused_with_the_most(overrides: list[str], most: int) -> None:
    dummy = [*overrides, "model.load=dummy"]
    for steps in (most + 1, 2000):
        assert re.search(rf"steps={steps}.*\b{most}\b", refused(*dummy, f"request.steps={steps}"))
    assert compose(*dummy, f"request.steps={most}").config.request.steps == most


def test_a_published_file_that_is_not_supported_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = shutil.copytree(REFERENCE / "emoji", tmp_path / "emoji")
    file = folder / "scheduler" / "scheduler_config.json"
    for content, reason in [
        ({"_class_name": "KarrasVeScheduler"}, "KarrasVeScheduler is not supported: its table holds sigma squared"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}, "beta_schedule='laplace' is not supported"),
    ]:
        file.write_text(json.dumps(content))
        assert f"{file}: " in (line := refused(f"model.path={folder}", "scheduler=published"))
        assert reason in line


FACTS = {
    "rectified_flow": {"prediction": "flow"},
    "ddpm": {
        "prediction": "eps",
        "train_steps": 1000,
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
    },
    "sgm": {"prediction": "edm", "edm_sign": 1, "sigma_data": 1.0, "tau_map": "flow_time"},
}


def training_facts(config: RunConfig) -> dict[str, object]:
    """Return the training facts that the scheduler receives."""
    values = {fact.name: getattr(config.scheduler, fact.name) for fact in fields(TrainingSettings)}
    return {name: value for name, value in values.items() if value is not None}


@pytest.mark.parametrize("family", FACTS)
def test_the_scheduler_gets_the_training_settings_of_the_weights(families: Path, family: str) -> None:
    config = compose(f"model.path={families}", f"scheduler={family}").config
    assert training_facts(config) == FACTS[family]
    assert training_facts(from_yaml(to_yaml(config))) == FACTS[family]


def test_a_family_may_have_steps_and_guidance_of_its_own(families: Path) -> None:
    own = [
        f"model.path={families}",
        "model.checkpoint_defaults.ddpm.steps=31",
        "model.checkpoint_defaults.ddpm.guidance=0",
    ]
    request = compose("scheduler=ddpm", *own).config.request
    assert (request.steps, request.guidance) == (31, 0.0)
    assert compose("scheduler=ddpm", "request.steps=7", *own).config.request.steps == 7
    request = compose(*own).config.request
    assert (request.steps, request.guidance) == (20, 3.0)


@pytest.mark.parametrize(
    ("family", "requested", "trained"),
    [
        ("rectified_flow", "scheduler.prediction=v", "flow"),
        ("ddpm", "scheduler.prediction=v", "eps"),
        ("ddpm", "scheduler.beta_end=0.03", "0.02"),
        ("sgm", "scheduler.edm_sign=-1", "1"),
        ("sgm", "scheduler.sigma_data=0.5", "1.0"),
    ],
)
def test_trained_weights_are_not_contradicted_and_random_ones_may_be(
    families: Path, family: str, requested: str, trained: str
) -> None:
    chosen = [f"model.path={families}", f"scheduler={family}"]
    line = refused(*chosen, requested)
    assert line.startswith(f"{requested} contradicts the checkpoint, which was trained with {trained}; drop it")
    assert "use model.load=dummy" in line
    key, value = requested.split("=")
    name = key.removeprefix("scheduler.")
    random = training_facts(compose(*chosen, requested, "model.load=dummy").config)
    assert str(random[name]) == value
    assert {**random, name: None} == {**FACTS[family], name: None}
    own = training_facts(compose(*chosen, f"model.checkpoint_defaults.{family}.{name}={value}").config)
    assert str(own[name]) == value
    compose(*chosen, f"{key}={FACTS[family][name]}")


def test_a_family_that_was_not_trained_is_refused(families: Path) -> None:
    chosen = [f"model.path={families}", "scheduler=ddpm", "~model.checkpoint_defaults.ddpm"]
    line = refused(*chosen)
    assert "was trained as rectified_flow, sgm, not ddpm" in line
    assert "use scheduler=rectified_flow or scheduler=sgm, or model.load=dummy" in line
    assert line.endswith("'+model.checkpoint_defaults={ddpm: {weights: FOLDER}}'")
    assert training_facts(compose(*chosen, "model.load=dummy").config) == {}
    compose(*chosen, "+model.checkpoint_defaults={ddpm: {weights: transformer_ddpm}}")


def test_a_model_without_a_denoiser_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names no denoiser; add one: .*rectified_flow"):
        denoiser_defaults(RunConfig())


def test_only_the_chosen_family_has_to_be_there(families: Path) -> None:
    shutil.rmtree(families / "transformer_ddpm")
    assert "no transformer_ddpm/ here" in refused(f"model.path={families}", "scheduler=ddpm")
    compose(f"model.path={families}")
    compose(f"model.path={families}", "scheduler=sgm")
    compose(f"model.path={families}", "scheduler=ddpm", "model.checkpoint_defaults.ddpm.weights=transformer_sgm")


def test_training_asks_nothing_of_a_checkpoint() -> None:
    assert training_facts(compose("task=train", "scheduler=ddpm", "model.path=/no/such/folder").config) == {}


def test_a_prompt_of_two_hundred_thousand_characters_is_refused() -> None:
    assert "200000 characters" in refused("request.prompt=" + "a" * 200_000)


def test_an_option_without_effect_is_reported() -> None:
    notes = compose("scheduler.rho=5").notes
    assert len(notes) == 1
    assert "rho" in notes[0]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


@pytest.fixture
def families(copy: Path) -> Path:
    """Write a checkpoint of three families: one network three times."""
    for family in ("ddpm", "sgm"):
        shutil.copytree(copy / "transformer", copy / f"transformer_{family}", dirs_exist_ok=True)
    return copy


def weights(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def test_a_checkpoint_without_weights_is_refused(copy: Path) -> None:
    weights(copy).unlink()
    assert "no weights here" in refused(f"model.path={copy}")


def test_a_checkpoint_without_a_component_is_refused(copy: Path) -> None:
    shutil.rmtree(copy / "tokenizer")
    assert "no tokenizer/ here" in refused(f"model.path={copy}")


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_a_truncated_file_is_refused(copy: Path, keep: int) -> None:
    data = weights(copy).read_bytes()
    weights(copy).write_bytes(data[:keep])
    assert str(weights(copy)) in refused(f"model.path={copy}")


FOREIGN = (b"\x80\x04\x95" + b"p" * 500, b"<html>" * 100, b"\x10" + b"\0" * 7 + b"not json at all!")


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_file_is_refused(copy: Path, content: bytes) -> None:
    weights(copy).write_bytes(content)
    assert "safetensors file" in refused(f"model.path={copy}")


def test_a_missing_shard_is_named(copy: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    weights(copy).rename(weights(copy).parent / "one.safetensors")
    (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "two.safetensors" in refused(f"model.path={copy}")


def test_keys_of_loading_come_back_from_the_resolved_configuration(tmp_path: Path) -> None:
    overrides = [
        f"model.vae.path={CHECKPOINT / 'vae'}",
        "model.vae.dtype=bfloat16",
        "model.denoiser.dtype=bfloat16",
        "model.text_encoder.dtype=float32",
        "model.text.keep_loaded=false",
        "model.text.cache_mib=3.5",
    ]
    model = compose(*overrides).config.model
    assert (model.vae.path, model.vae.dtype) == (str(CHECKPOINT / "vae"), DType.bfloat16)
    assert (model.denoiser.path, model.denoiser.dtype) == (None, DType.bfloat16)
    assert (model.text.keep_loaded, model.text.cache_mib) == (False, 3.5)
    config = compose(*overrides).config
    assert from_yaml(to_yaml(config)) == config


def test_loras_are_a_list_of_files_and_weights() -> None:
    listed = "model.lora=[{path: a.safetensors, weight: 0.8}, {path: b.safetensors}]"
    composed = compose(listed, "model.load=dummy")
    assert composed.config.model.lora == [LoraConfig("a.safetensors", 0.8), LoraConfig("b.safetensors", 1.0)]
    assert from_yaml(to_yaml(composed.config)) == composed.config


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("model.lora=[{weight: 0.8}]", "path"),
        ("model.lora=[{path: a.safetensors, wieght: 0.8}]", "wieght"),
        ("model.lora=[{path: a.safetensors, weight: much}]", "Float"),
        ("model.lora=[{path: /no/such.safetensors}]", "/no/such.safetensors: no such folder or file"),
        ("model.revison=v1", "did you mean model.revision?"),
        ("model.vae.dtype=float16", "expected one of [float32, bfloat16]"),
        ("model.text_encoder_2.path=/tmp", "has no text_encoder_2"),
        ("model.text.cache_mib=-1", "at least 0"),
        ("model.text.keep_loaded=sometimes", "sometimes"),
    ],
)
def test_keys_of_loading_are_refused_with_what_to_change(override: str, hint: str) -> None:
    assert hint in refused(override)


@pytest.mark.parametrize(
    "file", sorted((Path(conf.__file__).parent / "experiment").glob("*.yaml")), ids=lambda file: file.stem
)
def test_an_experiment_sweeps_options_and_keys_that_exist(file: Path) -> None:
    given = yaml.safe_load(file.read_text())
    swept = given.get("hydra", {}).get("sweeper", {}).get("params", {})
    check_names([f"{key}={values}" for key, values in swept.items()], sweep=True)
    if not swept:
        assert compose_run([f"experiment={file.stem}"]).config.task.name.name == "load"


@pytest.mark.parametrize("override", ["scheduler.solver.name=heun", "scheduler/solver=heun", "scheduler.shift=3"])
def test_nothing_is_set_beside_a_published_noise_scheduler(override: str) -> None:
    with pytest.raises(ConfigError, match=r"has no effect beside the checkpoint's own noise scheduler.*rectified_flow"):
        compose_run(["scheduler=published", override])


def test_a_checkpoint_without_a_noise_scheduler_names_the_families(tmp_path: Path) -> None:
    folder = shutil.copytree(REFERENCE / "emoji", tmp_path / "emoji")
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(ConfigError, match=r"scheduler_config\.json: not there; choose scheduler=rectified_flow"):
        compose_run([f"model.path={folder}", "scheduler=published"])


@pytest.mark.parametrize(("frames", "near"), [(0, "1"), (2, "1"), (7, "9"), (8, "9"), (100, "81"), (-3, "1")], ids=str)
def test_a_wrong_number_of_frames_names_the_nearest(frames: int, near: str) -> None:
    with pytest.raises(ValueError, match=f"1 \\+ a multiple of 4 frames, 81 at most: the nearest is {near}$"):
        check_frames(frames, 4, 81)


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["parallel.cfg=2", "request.guidance=1"], "request.guidance=1 is none"),
        (["parallel.ring=2", "attention=sdpa"], "use attention=flash, flex or math"),
        (["parallel.cfg=2", "model=flux", "model.load=dummy"], "has one branch; use parallel.cfg=1"),
        (["parallel.ulysses=2", "model=sd15", "model.load=dummy"], "use parallel.dp=2, or parallel.cfg=2"),
        (["model.offload=true", "model.text.keep_loaded=false"], "leave out model.text.keep_loaded=false"),
        (["parallel.shard_weights=true"], "which is one rank; use parallel=ulysses2"),
        (["parallel.shard_weights=true", "parallel=tp2"], "which is one rank; use parallel=ulysses2"),
        (
            ["parallel.shard_weights=true", "parallel=cfg2", "model=sd15", "model.load=dummy"],
            "has no equal blocks to shard",
        ),
        (["parallel.decode=frames", "parallel=cfg2"], "an image is requested; use parallel.decode=rows"),
        (
            ["parallel.decode=frames", "parallel.ulysses=3", "model=wan_1_3b", "model.load=dummy", "request.frames=17"],
            "3 ranks, 2 or more each; use 2 ranks or fewer, a longer video, or parallel.decode=rows",
        ),
        (["parallel.displaced=true", "parallel=ulysses2"], "and parallel.ring is 1; use parallel=displaced2"),
        (["parallel=displaced2", "parallel.warmup=0"], "give 1 to 10000"),
        (["parallel=displaced2", "task=serve"], "serve.max_batch=8 does not go with parallel.displaced=true"),
        (["parallel=pipe2", "task=load"], "set serve.max_batch=1"),
        (["parallel.pipe=0"], "give 1 to 1024"),
        (["parallel.pipe=7"], "the 6 blocks of model=emoji; use parallel.pipe=6 or fewer"),
        (["parallel=pipe2", "parallel.patches=65"], "of 64 image tokens; use 64 or fewer"),
        (["parallel=pipe2", "parallel.patches=0"], "give 1 to 65536"),
        (["parallel=pipe2", "parallel.tp=2"], "goes with parallel.dp and parallel.cfg alone"),
        (["parallel=pipe2", "model=sd15", "model.load=dummy"], "use parallel.dp=2, or parallel.cfg=2"),
        (["parallel=displaced2", "cache=guidance_skip"], "leave out parallel.displaced and parallel.pipe"),
        (["parallel=pipe2", "engine.optimize=eager"], "shards them; use engine.optimize=none, or drop parallel.pipe"),
    ],
)
def test_an_illegal_layout_names_a_legal_one(overrides: list[str], hint: str) -> None:
    assert hint in refused(*overrides)


def test_frames_that_one_rank_has_alone_are_reported() -> None:
    assert compose("parallel.decode=frames").notes == [
        "parallel.decode=frames has no effect: one rank decodes an image"
    ]


def test_a_layout_without_stale_keys_has_no_use_for_their_options() -> None:
    assert compose("parallel=ring2", "parallel.warmup=3", "parallel.patches=4").notes == [
        "parallel.warmup=3 has no effect: every evaluation is exact",
        "parallel.patches=4 has no effect: there is no pipeline",
    ]
    assert compose("parallel=displaced2", "attention=sdpa", "parallel.warmup=3").notes == []
    assert compose("parallel=pipe4", "parallel.patches=2").notes == [
        "2 patches in a pipeline of 4 ranks: no more than 2 compute at once"
    ]


def test_padding_is_reported() -> None:
    assert compose("parallel.ulysses=3").notes == [
        "64 image tokens over 3 ranks: 2 are padding",
        "8 attention heads over 3 ulysses ranks: 1 are padding",
    ]


def test_infinite_numbers_survive_a_record() -> None:
    """JSON has no infinity: a record with one was read as null, and refused."""
    config = compose_run(["serve.timeout_s=inf", "serve.keep_hours=inf"]).config
    plain = json.loads(json.dumps(to_dict(config), allow_nan=False))
    assert plain == to_dict(config)
    assert from_dict(plain) == from_yaml(to_yaml(config)) == config
