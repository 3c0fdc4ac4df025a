"""The grid made from a published configuration is diffusers' own: sigmas, timesteps, deviation of the first noise."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from schedulers import paths
from schedulers.diffusers_adapter import evaluation_points
from schedulers.published import from_diffusers
from schedulers.published.classes import BUILDERS
from schedulers.published.options import DEFAULTS, UNSUPPORTED
from tests.fixtures.schedulers.parity import Case, module_of, network_timesteps, published, table
from tests.fixtures.schedulers.published_cases import CASES, OPTIONS, REFUSALS, UNKNOWN

diffusers.utils.logging.set_verbosity_error()  # it warns of each option that another class has
STEPS = (5, 10, 20, 50)


def assert_same(case: Case, steps: int, wide: bool, rtol: float) -> None:
    with published(case, wide, [0]) as other:
        other.set_timesteps(steps, **case.set_timesteps)
        scheduler = case.ours()
        grid = scheduler.grid(steps, case.tokens)
        at = [point.tau for step in evaluation_points(scheduler, grid) for point in step]
        rows = None if case.name == "ScoreSdeVpScheduler" else table(other, case, steps)
        wanted, first = network_timesteps(other, case), float(getattr(other, "init_noise_sigma", 1.0))
    torch.testing.assert_close(torch.tensor(at, dtype=torch.float64), wanted, rtol=rtol, atol=rtol)
    assert grid.init_std == pytest.approx(first, rel=rtol)
    if rows is not None:
        flow = isinstance(scheduler.path, paths.FlowPath)
        level = grid.sigma if flow else grid.sigma / grid.alpha
        finite = torch.isfinite(rows)
        torch.testing.assert_close(level[finite], rows[finite], rtol=rtol, atol=1e-9)
        assert torch.equal(torch.isinf(level), ~finite)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grid_to_the_last_digits(case: Case) -> None:
    """With float32 read as float64 in diffusers' module, so that a rounding cannot hide a difference."""
    for steps in STEPS:
        if steps <= case.most:
            assert_same(case, steps, wide=True, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_grid_as_published(name: str) -> None:
    """diffusers' alpha-bar is a float32 product of 1000 factors: 1e-4 of sigma / alpha at worst."""
    for options in OPTIONS[name][:3]:
        for steps in STEPS:
            if not options.get("rescale_betas_zero_snr"):
                assert_same(Case(name, options), steps, wide=False, rtol=3e-4)


def test_every_class_of_diffusers_is_mapped_or_refused_and_every_mapped_one_is_run() -> None:
    theirs = {name for name in dir(diffusers) if name.endswith("Scheduler")} | {"ScoreSdeVpScheduler"}
    assert theirs == set(DEFAULTS) | set(UNSUPPORTED)
    assert not set(DEFAULTS) & set(UNSUPPORTED)
    assert set(BUILDERS) == set(DEFAULTS) == set(OPTIONS)


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_options_and_defaults_are_the_constructors(name: str) -> None:
    constructor = inspect.signature(getattr(module_of(name), name).__init__)
    wanted = {key: p.default for key, p in constructor.parameters.items() if key != "self"}
    assert dict(DEFAULTS[name]) == wanted


def test_a_file_is_read_and_what_another_class_has_is_ignored_as_diffusers_ignores_it(tmp_path: Path) -> None:
    config = {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0", "skip_prk_steps": True}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config | {"timestep_spacing": "leading"}))
    read = from_diffusers(tmp_path / "scheduler_config.json")
    assert read.timesteps(10)[0].item() == 900
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        from_diffusers(tmp_path / "list.json")
    with pytest.warns(UserWarning, match="no option 'beta_strat'; did you mean 'beta_start'"):
        from_diffusers(config | {"beta_strat": 0.1})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "needs _class_name"),
        ({"_class_name": "EulerDiscrete"}, "did you mean 'EulerDiscreteScheduler'"),
        ({"_class_name": "KarrasVeScheduler"}, "KarrasVeScheduler is not supported: its table holds sigma squared"),
        ({"_class_name": "DDIMScheduler", "beta_start": "1e-4"}, "beta_start='1e-4' is not supported: give a number"),
        ({"_class_name": "DDIMScheduler", "clip_sample": "no"}, "give true or false"),
        ({"_class_name": "DDIMScheduler", "trained_betas": "x"}, "give a list of numbers"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 10.5}, "give a whole number"),
        ({"_class_name": "DDIMScheduler", "prediction_type": None}, "give a name"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        from_diffusers(config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "options"), [(name, o) for some in (REFUSALS, UNKNOWN) for name, several in some.items() for o in several]
)
def test_an_option_that_cannot_be_honoured_is_refused_by_name(name: str, options: dict[str, Any]) -> None:
    """The first option of each is the wrong one."""
    with pytest.raises(ValueError, match=f"^{name} with {next(iter(options))}=.* is not supported: ") as refused:
        from_diffusers({"_class_name": name, **options})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("shift", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_flow_timesteps_are_truncated_to_the_same_whole_number_for_every_number_of_steps(
    name: str, shift: float
) -> None:
    """1000 sigma is often a whole number up to the last bit, which decides the time that the network gets."""
    case = Case(name, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift})
    scheduler = case.ours()
    with published(case, False, [0]) as other:
        for steps in range(2, 101):
            other.set_timesteps(steps)
            assert torch.equal(scheduler.timesteps(steps).long(), other.timesteps), steps
