"""Every mapped class at very few, at usual and at all trained steps: equal to diffusers, or a known difference."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

import models
from schedulers.published import check_published, from_diffusers
from tests.fixtures.schedulers.fuzz import mu_of, random_case
from tests.fixtures.schedulers.known_differences import KNOWN, Known, explanations
from tests.fixtures.schedulers.parity import Case
from tests.fixtures.schedulers.published_cases import CASES, OPTIONS, at_all_steps
from tests.fixtures.schedulers.steps import STEPS, Outcome, outcome

diffusers.utils.logging.set_verbosity_error()
QUIET = pytest.mark.filterwarnings("ignore")
FEW, LONG = (1, 2, 7), (999, 1000)
PUBLISHED = sorted((Path(models.__file__).parent / "published").glob("*/scheduler/scheduler_config.json"))
"""The file of every published checkpoint that has a model here."""

RANDOM_FILES = 500
BATCH = 50


def unexplained(outcomes: list[Outcome]) -> list[str]:
    """Return the outcomes that differ without a reason."""
    return [str(o) for o in outcomes if not o.agrees and not explanations(o)]


@QUIET
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_few_steps(name: str) -> None:
    cases = [case for case in CASES if case.name == name]
    assert not unexplained([outcome(case, steps) for case in cases for steps in FEW])


@pytest.mark.slow
@QUIET
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_usual_numbers_of_steps_and_every_trained_one(name: str) -> None:
    usual = [steps for steps in STEPS if steps not in (*FEW, *LONG)]
    outcomes = [outcome(case, steps) for case in CASES if case.name == name for steps in usual]
    outcomes += [outcome(case, steps) for case in at_all_steps(name) for steps in LONG]
    assert not unexplained(outcomes)


def case_of(file: Path) -> Case:
    """Return the configuration of a published file, with the mu of 4096 tokens where it needs one."""
    options = json.loads(file.read_text())
    name = options.pop("_class_name")
    if not options.get("use_dynamic_shifting"):
        return Case(name, options)
    return Case(name, options, {"mu": mu_of(options, 4096)}, 4096)


def named(file: Path) -> str:
    return file.parents[1].name


@QUIET
@pytest.mark.parametrize("file", PUBLISHED, ids=named)
def test_the_published_files_at_few_and_usual_steps(file: Path) -> None:
    assert not unexplained([outcome(case_of(file), steps) for steps in STEPS if steps not in LONG])


@pytest.mark.slow
@QUIET
@pytest.mark.parametrize("file", PUBLISHED, ids=named)
def test_the_published_files_at_every_trained_step(file: Path) -> None:
    assert not unexplained([outcome(case_of(file), steps) for steps in LONG])


@QUIET
def test_sdxl_runs_at_1000_steps_as_in_diffusers() -> None:
    """Its first timestep is 1000 of 0 to 999: the noise level of 999, and the network gets 1000."""
    (file,) = [file for file in PUBLISHED if named(file) == "sdxl"]
    found = outcome(case_of(file), 1000)
    assert found.agrees
    assert (found.times[0], found.ours) == (1000, "")


@QUIET
@pytest.mark.parametrize(
    "name",
    ["EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DDPM", "DDIM", "LCM", "TCD"],
)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_a_zero_terminal_snr_of_the_linear_betas(name: str, spacing: str) -> None:
    """diffusers raises the last alpha-bar of four of these classes above that of the timestep before it."""
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "beta_schedule": "linear"}
    case = Case(f"{name}Scheduler", {**options, "timestep_spacing": spacing, "beta_start": 0.0001, "beta_end": 0.02})
    for steps in (1, 2, 7, 25):
        found = outcome(case, steps)
        assert found.agrees, found
        assert not found.ours


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("sdxl", 1000),
        ("dit_256", 1000),
        ("sd21", 999),
        ("sd15", 999),
        ("pixart_alpha", 1000),
        ("ddpm_cifar10", 1000),
    ],
)
def test_the_most_steps_of_a_file_are_named_and_run(name: str, most: int) -> None:
    """What the check without torch allows has a grid, and one step more has none."""
    (file,) = [file for file in PUBLISHED if named(file) == name]
    config = json.loads(file.read_text())
    for steps in (1, most):
        check_published(config, steps)
        assert from_diffusers(config).grid(steps).steps == steps
    for steps in (most + 1, 5000):
        with pytest.raises(ValueError, match=f"^steps={steps} is not possible .* timesteps for {most} steps at most$"):
            check_published(config, steps)
        with pytest.raises(ValueError, match=f"steps={steps}"):
            from_diffusers(config).grid(steps)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan_14b", "qwen_image", "ncsnpp_church"])
def test_a_path_in_continuous_time_has_any_number_of_steps(name: str) -> None:
    (file,) = [file for file in PUBLISHED if named(file) == name]
    check_published(json.loads(file.read_text()), 5000)
    case = case_of(file)
    assert case.ours().grid(1500, case.tokens).steps == 1500


@QUIET
@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.where)
def test_each_known_difference_is_one(row: Known) -> None:
    found = outcome(*row.example)
    assert row.applies(found), found
    assert not found.agrees


@QUIET
@pytest.mark.parametrize(
    "change", [{"solver_order": 1}, {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}, {"solver_order": 4}]
)
def test_a_wrong_counterpart_is_an_unexplained_difference(change: dict[str, Any]) -> None:
    name = "UniPCMultistepScheduler"
    found = outcome(Case(name), 7, mine=Case(name, change))
    assert unexplained([found])


@pytest.mark.slow
@QUIET
@pytest.mark.parametrize("first", range(0, RANDOM_FILES, BATCH))
def test_random_files(first: int) -> None:
    """Every class in turn, with random options; see `random_case`."""
    found = [outcome(*random_case(seed)) for seed in range(first, first + BATCH)]
    assert not unexplained(found)
    assert sum(o.agrees and not o.ours for o in found) > BATCH / 3
