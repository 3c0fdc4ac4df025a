"""Settings: every legal combination samples, every illegal one is refused with what to change, without torch."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

import schedulers
from schedulers import Settings, resolve
from schedulers.build import build
from schedulers.families import FAMILIES, PREDICTIONS, REASONS, SOLVERS, SPACINGS
from schedulers.grid import Point
from schedulers.prediction import Estimate, Prediction

EVERY = [(f, p, s, g) for f in FAMILIES for p in PREDICTIONS for s in SOLVERS for g in SPACINGS]


def test_every_combination_either_samples_or_is_refused_with_a_reason() -> None:
    legal = 0
    for family, prediction, solver, spaced in EVERY:
        row = FAMILIES[family]
        if prediction in row.predictions and spaced in row.spacings:
            scheduler = build(Settings(family, prediction, solver, spaced))
            grid = scheduler.grid(5)

            def denoise(x: torch.Tensor, p: Point, meaning: Prediction = scheduler.prediction) -> Estimate:
                return meaning.estimate(torch.tanh(p.c_in * x), x, p)

            x = scheduler.init_noise(torch.ones(3), grid)
            x = scheduler.sample(x, grid, denoise, lambda i: torch.ones(3))
            assert torch.isfinite(x).all(), (family, prediction, solver, spaced)
            legal += 1
        else:
            with pytest.raises(ValueError, match=f"cannot run on family={family}: .{{20,}}Use one of: "):
                schedulers.check(family=family, prediction=prediction, solver=solver, spacing=spaced, steps=5)
    assert legal == 3 * (3 * 1 + 3 * 4 + 5 * 1)


def test_every_refusal_has_its_own_reason_and_refuses_nothing_legal() -> None:
    for family, row in FAMILIES.items():
        assert {p for p in PREDICTIONS if p not in row.predictions} == {
            name for f, part, name in REASONS if (f, part) == (family, "prediction")
        }
        assert {g for g in SPACINGS if g not in row.spacings} == {
            name for f, part, name in REASONS if (f, part) == (family, "spacing")
        }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "rectified-flow"}, "did you mean 'rectified_flow'"),
        ({"solver": "hein"}, "did you mean 'heun'. Choose one of: euler, ddim, heun"),
        ({"solver": "zzz"}, "unknown solver 'zzz'; Choose one of"),
        ({"spacing": "karas"}, "did you mean 'karras'"),
        ({"prediction": "epsilon"}, "unknown prediction 'epsilon'"),
        ({"steps": 0}, "steps=0; ask for at least 1"),
        ({"steps": 1001}, "ask for 1000 or fewer"),
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
        resolve(Settings("ddpm", train_steps=100), steps=101)
    with pytest.raises(ValueError, match="steps_offset=0"):
        build(Settings("ddpm", steps_offset=1)).grid(1000)
    with pytest.raises(ValueError, match="1000 or fewer"):
        build(Settings("ddpm")).grid(1001)
    for family in FAMILIES:
        with pytest.raises(ValueError, match="at least 1"):
            build(Settings(family)).grid(0)


def test_an_option_without_effect_warns_and_one_with_effect_does_not() -> None:
    with pytest.warns(UserWarning, match="shift, eta has no effect|eta, shift has no effect"):
        resolve(Settings("ddpm", shift=3.0, eta=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(Settings("rectified_flow", solver="ddim", shift=3.0, eta=0.5, sigma_last=0.001))
        resolve(Settings("sgm", sigma_data=1.0, edm_sign=-1, tau_map="flow_time", sigma_min=0.01, rho=5.0))
        resolve(
            Settings("ddpm", steps_offset=1, end="t_min", beta_schedule="scaled_linear", coordinates="ve", clip=1.0)
        )


def test_options_reach_the_objects() -> None:
    flow = build(Settings("rectified_flow", solver="ddim", eta=0.5, shift=3.0))
    assert (flow.solver.eta, flow.spacing.shift) == (0.5, 3.0)  # type: ignore[attr-defined]
    sgm = build(Settings("sgm", sigma_data=1.0, edm_sign=-1, tau_map="flow_time", sigma_min=0.01, sigma_max=50.0))
    assert sgm.timesteps(4)[0].item() == pytest.approx(1000 * 50 / 51)
    assert sgm.sigmas(4)[-2].item() == pytest.approx(0.01)
    assert sgm.grid(4)[0].c_in == pytest.approx((50.0**2 + 1) ** -0.5)
    x = torch.tensor([2.0])
    assert sgm.prediction.estimate(x * 0, x, sgm.grid(4)[0]).x0.item() == pytest.approx(2 / 2501)
    assert build(Settings("ddpm", clip=0.5)).prediction.limit == 0.5  # type: ignore[attr-defined]
    assert build(Settings("ddpm", train_steps=100)).timesteps(10)[0].item() == 90
    assert build(Settings("ddpm", spacing="linspace", integer_timesteps=False)).timesteps(7)[1].item() == 832.5


def test_checking_imports_no_torch() -> None:
    code = "import sys, schedulers; schedulers.check(family='sgm', steps=5); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
