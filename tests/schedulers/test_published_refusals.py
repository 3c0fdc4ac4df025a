"""A published configuration that cannot be built is refused without torch, and one that can be built is not."""

import math
import warnings
from typing import Any

import pytest
import torch

from schedulers.published import check_published, from_diffusers, values
from schedulers.published.betas import path_betas, path_ratios
from schedulers.published.common import discrete_path, trained_betas
from schedulers.published.options import DEFAULTS, Options, parse_options
from tests.fixtures.schedulers.bad_files import random_file
from tests.fixtures.schedulers.fuzz import random_case

SEEDS = range(3000)


def refused(content: dict[str, Any], steps: int | None = None) -> str:
    """Return the line with which a launcher refuses a file, or an empty string."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check_published(content, steps)
        except ValueError as error:
            return str(error)
    return ""


def build(content: dict[str, Any], steps: int, tokens: int) -> None:
    """Build a noise scheduler and its grid as a rank does."""
    for even_sigmas in (False, True):
        from_diffusers(content, even_sigmas).grid(steps, tokens)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(6))
def test_what_a_rank_cannot_build_is_refused_before(part: int) -> None:
    built = 0
    for seed in SEEDS[part::6]:
        content, steps, tokens = random_file(seed)
        if line := refused(content, steps):
            assert "\n" not in line
        else:
            build(content, steps, tokens)
            built += 1
    assert 100 < built < len(SEEDS) // 6 - 100


@pytest.mark.filterwarnings("ignore")
def test_no_value_that_published_files_have_is_out_of_range() -> None:
    """All values of these files are possible; what is refused is their combination, by another rule."""
    for seed in range(500):
        case, _ = random_case(seed)
        options = parse_options({"_class_name": case.name, **case.options})
        values.check_values(options)
    for name in DEFAULTS:
        values.check_values(parse_options({"_class_name": name}))


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("DDIMScheduler", {"beta_start": 0.0}, "beta_start=0.0 is not supported: give a number above 0"),
        ("DDIMScheduler", {"beta_end": 1.5}, "beta_end=1.5 is not supported: give betas inside (0, 1), two of them"),
        ("DDIMScheduler", {"trained_betas": [0.5]}, "trained_betas=[0.5] is not supported: give betas inside (0, 1)"),
        ("HeunDiscreteScheduler", {"trained_betas": [0.5, 1.0]}, "trained_betas=[0.5, 1.0] is not supported: the last"),
        ("DDIMScheduler", {"beta_end": 0.9}, "beta_end=0.9 is not supported: 1000 such betas leave nothing"),
        ("DDIMScheduler", {"num_train_timesteps": math.inf}, "num_train_timesteps=inf is not supported: give a whole"),
        ("DDIMScheduler", {"num_train_timesteps": 1}, "num_train_timesteps=1 is not supported: give 2 or more"),
        ("DDIMScheduler", {"beta_end": math.nan}, "beta_end=nan is not supported: give a number"),
        ("DDIMScheduler", {"set_alpha_to_one": 1}, "set_alpha_to_one=1 is not supported: give true or false"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": -1.0}, "shift=-1.0 is not supported: give a number above 0"),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 1e20}, "shift=1e+20 is not supported: with it every sigma is 1"),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"use_dynamic_shifting": True, "base_image_seq_len": 4096},
            "base_image_seq_len=4096 is not supported: give a whole number above 0 and below max_image_seq_len=4096",
        ),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"use_dynamic_shifting": True, "max_shift": 1000.0},
            "max_shift=1000.0 is not supported: give a number from -30 to 30; it is an exponent",
        ),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 1.0}, "shift_terminal=1.0 is not supported: give"),
        ("EDMEulerScheduler", {"sigma_min": 90.0}, "sigma_min=90.0 is not supported: it is not below sigma_max=80"),
        ("EDMEulerScheduler", {"rho": 1e-9}, "rho=1e-09 is not supported: its powers of sigma_min and sigma_max"),
        ("ScoreSdeVeScheduler", {"correct_steps": 0}, "correct_steps=0 is not supported: give a whole number above 0"),
        ("ScoreSdeVpScheduler", {"sampling_eps": 2.0}, "sampling_eps=2.0 is not supported: give a number between"),
        ("LCMScheduler", {"original_inference_steps": 2000}, "original_inference_steps=2000 is not supported: give a"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_its_option(name: str, options: dict[str, Any], line: str) -> None:
    assert refused({"_class_name": name, **options}).startswith(f"{name} with {line}")


@pytest.mark.parametrize(
    ("name", "options", "steps", "most"),
    [
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -3.0}, 1000, None),
        ("DPMSolverSinglestepScheduler", {"lambda_min_clipped": 2.0}, 1000, None),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": 4.0, "timestep_spacing": "leading"}, 60, None),
        ("DPMSolverMultistepScheduler", {"rescale_betas_zero_snr": True, "beta_end": 0.03}, 1000, None),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "beta_end": 0.03}, 1000, None),
        ("HeunDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": -1}, 20, 0),
    ],
)
def test_too_many_steps_are_refused_and_the_most_run(
    name: str, options: dict[str, Any], steps: int, most: int | None
) -> None:
    content = {"_class_name": name, **options}
    line = refused(content, steps)
    assert line.startswith(f"steps={steps} is not possible with the checkpoint's {name}; ")
    with pytest.raises(ValueError, match=r"."):
        build(content, steps, 1)
    if most is None:
        found = int(line.rpartition("timesteps for ")[2].partition(" ")[0])
        assert not refused(content, found)
        build(content, found, 1)
        assert refused(content, found + 1)
        with pytest.raises(ValueError, match=r"."):
            build(content, found + 1, 1)


def test_a_bound_that_leaves_no_timestep_is_named() -> None:
    content = {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": 1e3}
    assert refused(content, 4).endswith("its lambda_min_clipped=1000.0 leaves no timestep")


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp"])
@pytest.mark.parametrize("zero_snr", [True, False])
def test_the_betas_are_those_that_are_built(schedule: str, zero_snr: bool) -> None:
    values_of = DEFAULTS["EulerDiscreteScheduler"] | {"beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr}
    options = Options("EulerDiscreteScheduler", values_of)
    torch.testing.assert_close(
        torch.tensor(path_betas(options), dtype=torch.float64), trained_betas(options), rtol=1e-9, atol=1e-15
    )
    path = discrete_path(options)
    built = path.sigma(torch.arange(1000.0).double()) / path.alpha(torch.arange(1000.0).double())
    torch.testing.assert_close(torch.tensor(path_ratios(options), dtype=torch.float64), built, rtol=1e-6, atol=0)
