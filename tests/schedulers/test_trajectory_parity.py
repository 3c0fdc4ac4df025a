"""Whole trajectories equal diffusers', with a toy network in float32 and the same noise."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from schedulers import paths, spacing
from schedulers.build import build
from schedulers.grid import Grid
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import Clipped, Eps
from schedulers.settings import NoiseSchedulerSettings
from schedulers.solvers.euler import Euler

published: Any = diffusers  # its mix-ins hide their attributes from type checkers
SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
STEPS = pytest.mark.parametrize("steps", [7, 20, 50])
Network = Callable[[Tensor, float], Tensor]
Noise = Callable[[int], Tensor]
Run = Callable[[NoiseScheduler, Tensor, Grid], Tensor]


def theirs(scheduler: Any, steps: int, x: Tensor, network: Network, **step: Any) -> Tensor:
    """Run diffusers' own loop from the unscaled state x."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        fed = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(fed, t.item()), t, x, **step).prev_sample
    return x


def agree(ours: Tensor, wanted: Tensor, record: Callable[[str, object], None], rtol: float = 1e-5) -> None:
    """Return the largest difference relative to the largest value."""
    error = ((ours - wanted).abs().max() / wanted.abs().max()).item()
    record("relative_error", error)
    assert ours.dtype == torch.float32
    assert wanted.abs().max() > 0.1
    assert error < rtol


@STEPS
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize(("offset", "to_one"), [(0, True), (1, False)])
@pytest.mark.parametrize(("table", "rtol"), [(torch.float32, 2e-5), (torch.float64, 2e-6)])
def test_ddim_leading(
    steps: int,
    kind: str,
    offset: int,
    to_one: bool,
    table: torch.dtype,
    rtol: float,
    start: Tensor,
    network: Network,
    run: Run,
    record_property: Any,
) -> None:
    """diffusers keeps alpha_bar in float32 and loses digits at small sigma; with a float64 table it agrees better."""
    other = published.DDIMScheduler(
        **SD, prediction_type=NAMES[kind], clip_sample=False, steps_offset=offset, set_alpha_to_one=to_one
    )
    if table == torch.float64:
        other.alphas_cumprod = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=table) ** 2, 0)
        other.final_alpha_cumprod = other.final_alpha_cumprod if to_one else other.alphas_cumprod[0]
    end: spacing.End = "clean" if to_one else "t_min"
    ours = build(
        NoiseSchedulerSettings(
            "ddpm", prediction=kind, solver="euler", spacing="leading", steps_offset=offset, end=end, **SD
        )
    )
    agree(run(ours, start, ours.grid(steps)), theirs(other, steps, start, network), record_property, rtol)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_ddim_trailing_where_n_divides_the_trained_steps(
    steps: int, start: Tensor, network: Network, run: Run, record_property: Any
) -> None:
    other = published.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    ours = build(NoiseSchedulerSettings("ddpm", spacing="trailing"))
    agree(run(ours, start, ours.grid(steps)), theirs(other, steps, start, network), record_property)


@STEPS
@pytest.mark.parametrize("recompute", [False, True])
def test_ddim_clipped(
    steps: int, recompute: bool, start: Tensor, network: Network, run: Run, record_property: Any
) -> None:
    other = published.DDIMScheduler(clip_sample=True)
    path = paths.DiscreteVPPath(paths.betas("linear"))
    ours = NoiseScheduler(path, spacing.Leading(), Clipped(Eps(), 1.0, recompute), Euler())
    wanted = theirs(other, steps, start, network, use_clipped_model_output=recompute)
    agree(run(ours, start, ours.grid(steps)), wanted, record_property)


@STEPS
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_eta(
    steps: int, eta: float, start: Tensor, network: Network, noise: Noise, run: Run, record_property: Any
) -> None:
    other = published.DDIMScheduler(clip_sample=False)
    other.set_timesteps(steps)
    x = start
    for i, t in enumerate(other.timesteps):
        x = other.step(network(x, t.item()), t, x, eta=eta, variance_noise=noise(i)).prev_sample
    ours = build(NoiseSchedulerSettings("ddpm", solver="ddim", eta=eta))
    agree(run(ours, start, ours.grid(steps)), x, record_property)


@STEPS
@pytest.mark.parametrize(("shift", "last"), [(1.0, 0.001), (3.0, 0.003 / 1.002)])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_flow_match(
    steps: int, shift: float, last: float, solver: str, start: Tensor, network: Network, run: Run, record_property: Any
) -> None:
    kind = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}[solver]
    other = getattr(published, kind)(shift=shift)
    ours = build(NoiseSchedulerSettings("rectified_flow", solver=solver, shift=shift, sigma_last=last))
    agree(run(ours, start, ours.grid(steps)), theirs(other, steps, start, network), record_property)


@STEPS
@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("spaced", ["leading", "karras"])
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_euler_and_heun_discrete(
    steps: int, solver: str, spaced: str, kind: str, start: Tensor, network: Network, run: Run, record_property: Any
) -> None:
    cls = {"euler": published.EulerDiscreteScheduler, "heun": published.HeunDiscreteScheduler}[solver]
    cut = {"use_karras_sigmas": True} if spaced == "karras" else {"timestep_spacing": "leading"}
    other = cls(**SD, **cut, prediction_type=NAMES[kind])
    ours = build(NoiseSchedulerSettings("ddpm", prediction=kind, solver=solver, spacing=spaced, coordinates="ve", **SD))
    grid = ours.grid(steps)
    x = ours.init_noise(start, grid)
    agree(run(ours, x, grid), theirs(other, steps, x, network), record_property)


@STEPS
def test_euler_linspace(steps: int, start: Tensor, network: Network, run: Run, record_property: Any) -> None:
    other = published.EulerDiscreteScheduler(**SD, timestep_spacing="linspace")
    path = paths.DiscreteVPPath(paths.betas("scaled_linear", 0.00085, 0.012), interpolation="linear")
    ours = NoiseScheduler(paths.VECoordinates(path), spacing.Linspace(), Eps(), Euler())
    grid = ours.grid(steps)
    x = ours.init_noise(start, grid)
    agree(run(ours, x, grid), theirs(other, steps, x, network), record_property)


@STEPS
@pytest.mark.parametrize(("named", "sign"), [("epsilon", 1), ("v_prediction", -1)])
def test_edm_euler(
    steps: int, named: str, sign: int, start: Tensor, network: Network, run: Run, record_property: Any
) -> None:
    other = published.EDMEulerScheduler(prediction_type=named)
    ours = build(NoiseSchedulerSettings("sgm", edm_sign=sign))
    grid = ours.grid(steps)
    x = ours.init_noise(start, grid)
    agree(run(ours, x, grid), theirs(other, steps, x, network), record_property)
