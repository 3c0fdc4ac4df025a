"""Settings: every legal combination samples, every illegal one is refused with what to change, without torch."""

import subprocess
import sys
import warnings
from inspect import get_annotations
from typing import Any

import pytest
import torch

import schedulers
from harness.config.schema import CheckpointDefaults, SchedulerConfig, SolverConfig
from schedulers import NoiseSchedulerSettings, resolve
from schedulers.build import build
from schedulers.compatibility import (
    FLOW_LINSPACE_OPTIONS,
    PREDICTION_OPTIONS,
    REASONS,
    UNSUPPORTED_AT_PURE_NOISE,
    starts_at_pure_noise,
)
from schedulers.grid import Point
from schedulers.prediction import Estimate, Prediction
from schedulers.solvers.base import SolverState
from schedulers.tables import FAMILIES, PATHS, PREDICTIONS, SOLVERS, SPACINGS, families

EVERY = [
    (family, path, p, s, g)
    for family, paths in families().items()
    for path in paths
    for p in PREDICTIONS
    for s in SOLVERS
    for g in SPACINGS
]
START = torch.tensor([[1.0, -0.5], [0.3, 2.0]])


def test_every_combination_either_samples_or_is_refused_with_a_reason() -> None:
    legal = 0
    for family, path, prediction, solver, spaced in EVERY:
        row = PATHS[path]
        sigmas = [0.9, 0.7, 0.5, 0.3, 0.1] if spaced == "custom" else None
        settings = NoiseSchedulerSettings(
            family, prediction=prediction, solver=solver, spacing=spaced, path=path, sigmas=sigmas
        )
        known = prediction in row.predictions and spaced in row.spacings and (path, "solver", solver) not in REASONS
        if not known:
            with pytest.raises(ValueError, match=f"cannot run on family={family}.*: .{{20,}}Use one of: "):
                resolve(settings, 5)
            continue
        if solver in UNSUPPORTED_AT_PURE_NOISE and starts_at_pure_noise(settings):
            with pytest.raises(ValueError, match=r"cannot start at alpha = 0.*set sigma_(first|max)=0\.999"):
                resolve(settings, 5)
            continue
        if prediction != row.predictions[0] and spaced != row.spacings[0]:
            resolve(settings, 5)
            continue
        scheduler = build(settings)
        grid = scheduler.grid(5)

        def denoise(x: torch.Tensor, p: Point, meaning: Prediction = scheduler.prediction) -> Estimate:
            return meaning.estimate(torch.tanh(p.c_in * x), x, p)

        x = scheduler.sample(scheduler.init_noise(START, grid), grid, denoise, lambda i: START.flip(0))
        assert torch.isfinite(x).all(), settings
        legal += 1
    assert legal > 700


def test_every_refusal_has_its_own_reason_and_refuses_nothing_legal() -> None:
    for path, row in PATHS.items():
        assert {p for p in PREDICTIONS if p not in row.predictions} == {
            name for f, part, name in REASONS if (f, part) == (path, "prediction")
        }
        assert {g for g in SPACINGS if g not in row.spacings} == {
            name for f, part, name in REASONS if (f, part) == (path, "spacing")
        }


def test_every_option_belongs_somewhere() -> None:
    """An option that nothing reads would be dead; each also has a key of the same name on the command line."""
    read = {name for row in PATHS.values() for name in row.options} | {
        n for row in SOLVERS.values() for n in row.options
    }
    read |= {name for row in SPACINGS.values() for name in row.options} | set(FLOW_LINSPACE_OPTIONS)
    read |= {name for names in PREDICTION_OPTIONS.values() for name in names}
    always = {"family", "path", "prediction", "solver", "spacing", "clip", "threshold", "state_dtype", "plugin"}
    assert set(NoiseSchedulerSettings.__dataclass_fields__) == read | always


def test_a_setting_is_declared_once() -> None:
    """Only the family, which may be `published` in a configuration, and the solver, a group there, are two things."""
    kinds = {kind for top in (NoiseSchedulerSettings, SchedulerConfig, CheckpointDefaults) for kind in top.__mro__[:-1]}
    declared = [name for kind in (*kinds, SolverConfig) for name in get_annotations(kind)]
    assert {name for name in declared if declared.count(name) > 1} == {"family", "solver"}
    assert len(declared) > 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "rectified-flow"}, "did you mean 'rectified_flow'"),
        ({"solver": "hein"}, "did you mean 'heun'. Choose one of: euler, ddim, ancestral"),
        ({"solver": "zzz"}, "unknown solver 'zzz'; Choose one of"),
        ({"spacing": "karas"}, "did you mean 'karras'"),
        ({"prediction": "epsilon"}, "unknown prediction 'epsilon'"),
        ({"steps": 0}, "steps=0; use at least 1"),
        ({"steps": 1001}, "use 1000 or fewer"),
        ({"family": "rectified_flow", "prediction": "eps"}, "alpha = 0"),
    ],
)
def test_messages_say_what_to_change(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedulers.check(**{"family": "ddpm", **change})


def test_limits_that_depend_on_the_settings() -> None:
    assert schedulers.check("rectified_flow", steps=5000).solver == "euler"
    assert schedulers.check("ddpm", spacing="karras", steps=5000).prediction == "eps"
    with pytest.raises(ValueError, match="100 or fewer"):
        resolve(NoiseSchedulerSettings("ddpm", train_steps=100), steps=101)
    with pytest.raises(ValueError, match="steps_offset=0"):
        build(NoiseSchedulerSettings("ddpm", steps_offset=1)).grid(1000)
    with pytest.raises(ValueError, match="1000 or fewer"):
        build(NoiseSchedulerSettings("ddpm")).grid(1001)
    for family in FAMILIES:
        with pytest.raises(ValueError, match="at least 1"):
            build(NoiseSchedulerSettings(family)).grid(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            NoiseSchedulerSettings("ddpm", zero_terminal_snr=True),
            "prediction=eps does not determine x0 at zero terminal SNR",
        ),
        (
            NoiseSchedulerSettings("ddpm", prediction="v", zero_terminal_snr=True, coordinates="ve"),
            "coordinates=ve divides by alpha",
        ),
        (NoiseSchedulerSettings("ddpm", prediction="v", spacing="karras", zero_terminal_snr=True), "set sigma_max"),
        (
            NoiseSchedulerSettings("ddpm", prediction="v", solver="pndm", spacing="trailing", zero_terminal_snr=True),
            "use spacing=leading",
        ),
        (
            NoiseSchedulerSettings("sgm", path="flow"),
            "path=flow does not belong to family=sgm. Use one of: edm, ve, vp, sub_vp",
        ),
        (NoiseSchedulerSettings("ddpm", solver="ddpm", variance="learned"), "needs a checkpoint with learned_variance"),
        (NoiseSchedulerSettings("rectified_flow", shift=3.0, mu=1.0), "give only one of them"),
        (NoiseSchedulerSettings("rectified_flow", base_shift=0.5), "go together"),
        (NoiseSchedulerSettings("rectified_flow", solver="euler_maruyama"), "set sigma_first=0.999"),
        (NoiseSchedulerSettings("rectified_flow", spacing="custom"), "needs its levels"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings: NoiseSchedulerSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (NoiseSchedulerSettings("sgm", spacing="custom", sigmas=[3.0, 1.0]), "use 2 steps"),
        (NoiseSchedulerSettings("ddpm", solver="lcm", spacing="lcm"), "distilled on original_steps=50"),
    ],
)
def test_a_number_of_steps_that_the_spacing_does_not_have(settings: NoiseSchedulerSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(settings, 60)


def test_what_starts_at_pure_noise_may_start_just_below_it() -> None:
    flow = build(NoiseSchedulerSettings("rectified_flow", solver="euler_maruyama", sigma_first=0.999))
    assert 0 < flow.grid(5)[0].alpha < 0.01
    terminal = build(
        NoiseSchedulerSettings("ddpm", prediction="v", solver="ddim", spacing="trailing", zero_terminal_snr=True)
    )
    assert terminal.grid(5)[0].alpha == 0
    grid = terminal.grid(5)

    def denoise(x: torch.Tensor, p: Point) -> Estimate:
        return terminal.prediction.estimate(torch.tanh(x), x, p)

    assert torch.isfinite(terminal.sample(START, grid, denoise, lambda i: START)).all()


def test_a_shift_that_grows_with_the_image() -> None:
    """FLUX: mu from 0.5 at 256 tokens to 1.15 at 4096."""
    flux = build(NoiseSchedulerSettings("rectified_flow", base_shift=0.5, max_shift=1.15))
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        torch.testing.assert_close(
            flux.grid(8, tokens).sigma,
            build(NoiseSchedulerSettings("rectified_flow", mu=mu)).grid(8).sigma,
            rtol=1e-12,
            atol=0,
        )
    with pytest.raises(ValueError, match="depends on the image size"):
        flux.grid(8)


def test_the_state_is_rounded_where_configured(gaussian: Any) -> None:
    exact = build(NoiseSchedulerSettings("sgm"))
    rounded = build(NoiseSchedulerSettings("sgm", state_dtype="bfloat16"))
    grid, x = exact.grid(3), 80 * torch.linspace(-1, 1, 7)
    fine, coarse = (s.step(x, 0, grid, gaussian.denoise, SolverState(), torch.zeros) for s in (exact, rounded))
    assert coarse.dtype == torch.float32
    assert torch.equal(coarse, fine.bfloat16().float())
    assert not torch.equal(coarse, fine)


def test_an_option_without_effect_warns_and_one_with_effect_does_not() -> None:
    with pytest.warns(UserWarning, match="shift, eta has no effect|eta, shift has no effect"):
        resolve(NoiseSchedulerSettings("ddpm", shift=3.0, eta=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(NoiseSchedulerSettings("rectified_flow", solver="ddim", shift=3.0, eta=0.5, sigma_last=0.001))
        resolve(
            NoiseSchedulerSettings("sgm", sigma_data=1.0, edm_sign=-1, tau_map="flow_time", sigma_min=0.01, rho=5.0)
        )
        resolve(
            NoiseSchedulerSettings(
                "ddpm", steps_offset=1, end="t_min", beta_schedule="scaled_linear", coordinates="ve", clip=1.0
            )
        )


def test_options_reach_the_objects() -> None:
    flow = build(NoiseSchedulerSettings("rectified_flow", solver="ddim", eta=0.5, shift=3.0))
    assert (flow.solver.eta, flow.spacing.shift) == (0.5, 3.0)  # type: ignore[attr-defined]
    sgm = build(
        NoiseSchedulerSettings("sgm", sigma_data=1.0, edm_sign=-1, tau_map="flow_time", sigma_min=0.01, sigma_max=50.0)
    )
    assert sgm.timesteps(4)[0].item() == pytest.approx(1000 * 50 / 51)
    assert sgm.sigmas(4)[-2].item() == pytest.approx(0.01)
    assert sgm.grid(4)[0].c_in == pytest.approx((50.0**2 + 1) ** -0.5)
    x = torch.tensor([2.0])
    assert sgm.prediction.estimate(x * 0, x, sgm.grid(4)[0]).x0.item() == pytest.approx(2 / 2501)
    assert build(NoiseSchedulerSettings("ddpm", clip=0.5)).prediction.limit == 0.5  # type: ignore[attr-defined]
    assert build(NoiseSchedulerSettings("ddpm", train_steps=100)).timesteps(10)[0].item() == 90
    assert (
        build(NoiseSchedulerSettings("ddpm", spacing="linspace", integer_timesteps=False)).timesteps(7)[1].item()
        == 832.5
    )


def test_checking_imports_no_torch() -> None:
    code = "import sys, schedulers; schedulers.check(family='sgm', steps=5); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
