"""A noise scheduler is held to diffusers' own class: equal as it is, different with a fault planted in ours."""

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch

from schedulers import build as building
from schedulers.build import build
from schedulers.grid import Grid
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.published import from_diffusers
from schedulers.published.inverse import find_peer
from schedulers.published.options import DEFAULTS
from schedulers.published.peer import difference_from_diffusers, diffusers_config, published_difference
from schedulers.settings import NoiseSchedulerSettings
from schedulers.solvers import adams
from schedulers.solvers.dpm import DPMSolver, StepFactors
from schedulers.solvers.heun import Heun
from schedulers.solvers.posterior import DDPM
from schedulers.solvers.unipc import UniPC
from schedulers.spacing import FlowLinspace
from tests.fixtures.schedulers.published_cases import OPTIONS

diffusers.utils.logging.set_verbosity_error()
EXACT, SEEN, STEPS, TOKENS = 1e-6, 1e-4, 14, 1024  # LCM's class multiplies in float32, 2e-7; the others agree to 1e-13
SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW_EULER, EULER = "FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"
MULTISTEP, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"


def flow(**changes: Any) -> NoiseSchedulerSettings:
    return NoiseSchedulerSettings("rectified_flow", **changes)


def ddpm(**changes: Any) -> NoiseSchedulerSettings:
    return NoiseSchedulerSettings("ddpm", **{"spacing": "trailing", **SD, **changes})


def sgm(**changes: Any) -> NoiseSchedulerSettings:
    return NoiseSchedulerSettings("sgm", **changes)


SHIFTS = {"base_shift": 0.5, "max_shift": 1.15}
SETTINGS: list[tuple[str, NoiseSchedulerSettings, str | None]] = [
    (FLOW_EULER, flow(), None),
    (FLOW_EULER, flow(shift=3.0), None),
    (FLOW_EULER, flow(mu=0.7, sigma_first=0.9, sigma_last=0.01), None),
    (FLOW_EULER, flow(**SHIFTS), None),
    (FLOW_EULER, flow(base_shift=0.5, max_shift=0.9, max_tokens=8192, shift_terminal=0.02), None),
    (FLOW_EULER, flow(spacing="karras"), None),
    (FLOW_EULER, flow(spacing="exponential", sigma_min=0.01), None),
    (FLOW_EULER, flow(spacing="beta"), None),
    ("FlowMatchHeunDiscreteScheduler", flow(solver="heun", shift=3.0), FLOW_EULER),
    ("FlowMatchLCMScheduler", flow(solver="lcm", shift=3.0), None),
    (MULTISTEP, flow(solver="dpmpp_2m", kind="heun", **SHIFTS), FLOW_EULER),
    (MULTISTEP, flow(solver="dpmpp_2m_sde", shift=3.0), FLOW_EULER),
    (MULTISTEP, flow(prediction="x0"), FLOW_EULER),
    (MULTISTEP, flow(solver="ancestral"), FLOW_EULER),
    (SINGLE, flow(solver="dpmpp_3s", sigma_first=0.99), FLOW_EULER),
    ("UniPCMultistepScheduler", flow(solver="unipc", sigma_first=0.99, shift=3.0, order=3), FLOW_EULER),
    ("DDIMScheduler", ddpm(solver="ddim", spacing="leading", steps_offset=1, end="t_min"), None),
    ("DDIMScheduler", ddpm(solver="ddim", spacing="leading", eta=0.5, clip=1.0), None),
    ("DDIMScheduler", ddpm(solver="ddim", stride_target=True, zero_terminal_snr=True, prediction="v"), None),
    ("DDIMScheduler", ddpm(spacing="leading", prediction="x0"), None),
    ("DDIMScheduler", ddpm(solver="ancestral", spacing="leading", threshold=0.9, clip=1.5), None),
    (MULTISTEP, ddpm(solver="ddim"), None),
    (MULTISTEP, ddpm(solver="ancestral"), None),
    ("DDPMScheduler", ddpm(solver="ddpm", spacing="leading", variance="large", clip=1.0), None),
    ("DDPMScheduler", ddpm(solver="ddpm", spacing="linspace", learned_variance=True, variance="learned_range"), None),
    ("DDPMScheduler", ddpm(solver="ddpm", learned_variance=True, variance="learned", final_noise=True), None),
    ("DDPMScheduler", ddpm(solver="ddpm", learned_variance=True), None),
    (EULER, ddpm(spacing="karras"), None),
    (EULER, ddpm(spacing="exponential", coordinates="ve"), None),
    (EULER, ddpm(spacing="custom", sigmas=[10.0 * 0.7**i for i in range(STEPS)]), None),
    ("HeunDiscreteScheduler", ddpm(solver="heun", coordinates="ve", prediction="v"), None),
    ("HeunDiscreteScheduler", ddpm(solver="heun", coordinates="ve", spacing="beta"), None),
    ("KDPM2DiscreteScheduler", ddpm(solver="dpm2"), None),
    ("KDPM2AncestralDiscreteScheduler", ddpm(solver="dpm2", eta=1.0, coordinates="ve"), None),
    ("LMSDiscreteScheduler", ddpm(solver="lms", spacing="karras"), None),
    (MULTISTEP, ddpm(solver="dpmpp_2m", prediction="v", threshold=0.9), None),
    (MULTISTEP, ddpm(solver="dpmpp_2m", spacing="karras"), EULER),
    (MULTISTEP, ddpm(solver="dpmpp_2m_sde", spacing="linspace", spare_row=True, kind="heun"), None),
    (SINGLE, ddpm(solver="dpmpp_2s", spacing="leading"), EULER),
    (SINGLE, ddpm(solver="dpmpp_3s", spacing="linspace", spare_row=True), None),
    ("UniPCMultistepScheduler", ddpm(solver="unipc", order=3, spacing="karras", round_tau="round"), None),
    ("UniPCMultistepScheduler", ddpm(solver="unipc", b="bh1", end="t_min", corrector=False), None),
    ("DEISMultistepScheduler", ddpm(solver="deis", order=3, end="t_min"), None),
    ("PNDMScheduler", ddpm(solver="pndm", spacing="leading", steps_offset=1), None),
    ("PNDMScheduler", ddpm(solver="pndm", spacing="leading", runge_kutta=True, end="t_min"), None),
    ("LCMScheduler", ddpm(solver="lcm", spacing="lcm", prediction="v"), None),
    ("TCDScheduler", ddpm(solver="tcd", spacing="lcm"), None),
    ("EDMEulerScheduler", sgm(edm_sign=-1, sigma_data=1.0), None),
    ("EDMEulerScheduler", sgm(solver="ddim", spacing="exponential", tau_map="flow_time", end="t_min"), None),
    ("EDMDPMSolverMultistepScheduler", sgm(solver="dpmpp_2m", rho=5.0, sigma_max=30.0), None),
    ("EDMDPMSolverMultistepScheduler", sgm(solver="dpmpp_2m_sde", tau_map="arctan", kind="heun"), None),
    ("ScoreSdeVeScheduler", sgm(path="ve", solver="predictor_corrector", corrections=2, sigma_max=380.0), None),
]
"""The class of diffusers, the settings, and the class that makes its rows if that is another one."""


@pytest.mark.parametrize(("name", "settings", "rows_of"), SETTINGS)
def test_settings_agree_with_diffusers_own_class(
    name: str, settings: NoiseSchedulerSettings, rows_of: str | None, record_property: Callable[[str, object], None]
) -> None:
    found = difference_from_diffusers(settings, STEPS, TOKENS)
    assert found is not None
    assert (found.class_name, found.rows_of) == (name, rows_of)
    record_property("rel_l2", found.rel_l2)
    assert found.rel_l2 < EXACT, found


OWN_ROWS = [
    (name, settings)
    for name, settings, rows_of in SETTINGS
    if rows_of is None and name != FLOW_EULER and settings.spacing != "custom" and settings.tau_map is None
]


@pytest.mark.parametrize(("name", "settings"), OWN_ROWS)
def test_the_mapping_takes_the_configuration_back_to_the_same_rows(name: str, settings: NoiseSchedulerSettings) -> None:
    """The last timestep is that of no evaluation."""
    config = diffusers_config(settings, STEPS, TOKENS)
    assert config is not None
    mapped = from_diffusers({"_class_name": name, **config[1]}, even_sigmas=name == "FlowMatchLCMScheduler")
    theirs, ours = mapped.grid(STEPS, TOKENS), build(settings).grid(STEPS, TOKENS)
    ends = slice(None, -1) if name == "TCDScheduler" else slice(None)  # its last step stops at another row
    level = [grid.sigma / (grid.alpha + grid.sigma) for grid in (ours, theirs)]
    torch.testing.assert_close(level[0][ends], level[1][ends], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.tau[:-1], theirs.tau[:-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        flow(solver="rk45"),
        flow(solver="unipc"),
        flow(solver="dpmpp_2s"),
        flow(sigma_cap=0.95),
        flow(prediction="v"),
        ddpm(solver="dpmpp_3m"),
        ddpm(solver="deis"),
        ddpm(solver="edm_churn"),
        ddpm(solver="ddim", eta=0.5),
        ddpm(solver="ddpm", variance="large"),
        ddpm(solver="heun"),
        ddpm(solver="dpmpp_2m", clip=1.0),
        ddpm(solver="dpmpp_2m", zero_terminal_snr=True, prediction="v"),
        sgm(solver="heun"),
        sgm(prediction="eps"),
        sgm(path="ve", solver="dpmpp_2m"),
        sgm(path="vp", solver="euler_maruyama"),
    ],
)
def test_settings_that_no_class_has(settings: NoiseSchedulerSettings) -> None:
    assert diffusers_config(settings, STEPS) is None
    assert difference_from_diffusers(settings, STEPS) is None


def changed_grid(change: Callable[[Grid], Grid]) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        grid = NoiseScheduler.grid
        patch.setattr(NoiseScheduler, "grid", lambda self, steps, tokens=None: change(grid(self, steps, tokens)))

    return plant


def one_sigma_row(grid: Grid) -> Grid:
    sigma = grid.sigma.clone()
    sigma[STEPS // 2] *= 1.01
    return replace(grid, sigma=sigma)


def without_last_row(grid: Grid) -> Grid:
    columns = ("t", "alpha", "sigma", "tau", "c_in")
    return replace(grid, **{name: getattr(grid, name)[:-1] for name in columns})


def in_the_spacing(patch: pytest.MonkeyPatch) -> None:
    grid = FlowLinspace.grid
    patch.setattr(FlowLinspace, "grid", lambda self, *args: grid(replace(self, shift=self.shift * 1.01), *args))


def in_the_building(patch: pytest.MonkeyPatch) -> None:
    make = building.flow_linspace
    patch.setattr(building, "flow_linspace", lambda **given: make(**given | {"shift": 1.01 * given.get("shift", 1.0)}))


def times(owner: Any, name: str, factor: float = 1.01) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a plant that multiplies what a function of ours returns."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        inner = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: factor * inner(*args, **kwargs))

    return plant


def weights(patch: pytest.MonkeyPatch) -> None:
    inner = adams._weights
    patch.setattr(adams, "_weights", lambda *args: [1.01 * c for c in inner(*args)])


def second_difference(patch: pytest.MonkeyPatch) -> None:
    """Plant 1.01 at the factor of the second order of DPM-Solver, p2."""
    inner = DPMSolver._sum

    def changed(self: DPMSolver, state: Any, order: int, h: float, step: float) -> torch.Tensor:
        first = inner(self, state, 1, h, step)
        return first + 1.01 * (inner(self, state, order, h, step) - first)

    patch.setattr(DPMSolver, "_sum", changed)


def estimate_factor(patch: pytest.MonkeyPatch) -> None:
    between = StepFactors.between

    def changed(*args: Any) -> StepFactors:
        factors = between(*args)
        return replace(factors, estimate_factor=1.01 * factors.estimate_factor)

    patch.setattr(StepFactors, "between", staticmethod(changed))


def second_stage(patch: pytest.MonkeyPatch) -> None:
    """Plant 1.01 at the second half of Heun's step."""
    step = Heun.step

    def changed(self: Heun, x: torch.Tensor, i: int, grid: Grid, denoise: Any, *rest: Any) -> torch.Tensor:
        first = grid[i + 1].alpha * (now := denoise(x, grid[i])).x0 + grid[i + 1].sigma * now.eps
        calls = iter([now])
        whole = step(self, x, i, grid, lambda x, point: next(calls, None) or denoise(x, point), *rest)
        return first + 1.01 * (whole - first)

    patch.setattr(Heun, "step", changed)


PLANTS: list[tuple[str, Callable[[pytest.MonkeyPatch], None], NoiseSchedulerSettings]] = [
    *((f"{kind} sigma row", changed_grid(one_sigma_row), settings) for kind, settings in [
        ("flow", flow(shift=3.0)),
        ("ddpm", ddpm(solver="dpmpp_2m")),
        ("sgm", sgm(solver="dpmpp_2m")),
    ]),
    *((f"{kind} last row", changed_grid(without_last_row), settings) for kind, settings in [
        ("flow", flow()),
        ("ddpm", ddpm(solver="ddim")),
        ("sgm", sgm()),
    ]),
    *((f"{kind} timestep", changed_grid(lambda grid: replace(grid, tau=grid.tau + 1)), settings) for kind, settings in [
        ("flow", flow()),
        ("ddpm", ddpm(solver="ddim")),
        ("sgm", sgm()),
    ]),
    ("first noise", changed_grid(lambda grid: replace(grid, init_std=1.01 * grid.init_std)), sgm()),
    ("shift of the spacing", in_the_spacing, flow(shift=3.0)),
    ("shift of the settings", in_the_building, flow(shift=3.0)),
    ("DPM-Solver p2", second_difference, ddpm(solver="dpmpp_2m")),
    ("DPM-Solver factor", estimate_factor, sgm(solver="dpmpp_2m_sde")),
    ("UniPC weights", times(UniPC, "_rho"), ddpm(solver="unipc", order=3)),
    ("LMS weights", weights, ddpm(solver="lms")),
    ("DEIS weights", weights, ddpm(solver="deis", end="t_min")),
    ("DDPM noise", times(DDPM, "_noise_std"), ddpm(solver="ddpm", spacing="leading")),
    ("Heun's second stage", second_stage, flow(solver="heun", shift=3.0)),
]  # fmt: skip


@pytest.mark.parametrize(("plant", "settings"), [pytest.param(*case[1:], id=case[0]) for case in PLANTS])
def test_a_planted_fault_is_seen(
    plant: Callable[[pytest.MonkeyPatch], None],
    settings: NoiseSchedulerSettings,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    plant(monkeypatch)
    found = difference_from_diffusers(settings, STEPS, TOKENS)
    assert found is not None
    record_property("rel_l2", found.rel_l2)
    assert found.rel_l2 > SEEN, found


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_a_published_configuration_agrees_with_its_class(name: str) -> None:
    """The cosine class imports torchsde, which an empty module stands for: its noise is given."""
    with mock.patch.dict(sys.modules, {"torchsde": sys.modules.get("torchsde", types.ModuleType("torchsde"))}):
        for options in OPTIONS[name][:3]:
            steps = 10 if "trained_betas" in options else STEPS
            found = published_difference({"_class_name": name, **options}, steps)
            assert (found.class_name, found.config) == (name, options)
            assert found.rel_l2 < EXACT, found


def test_a_published_flow_gets_what_its_pipeline_passes() -> None:
    config = {"_class_name": FLOW_EULER, "use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192}
    found = published_difference(config, STEPS, TOKENS, even_sigmas=True)
    assert found.rel_l2 < EXACT
    peer = find_peer(flow(base_shift=0.5, max_shift=0.9, max_tokens=8192), STEPS, TOKENS)
    assert peer is not None
    assert peer.mu == pytest.approx(0.5 + (TOKENS - 256) * 0.4 / (8192 - 256))


def test_diffusers_stays_as_it_is() -> None:
    """The float64 and the noise belong to a private copy of its module."""
    module = importlib.import_module(diffusers.DDPMScheduler.__module__)
    before = dict(vars(module)), diffusers.DDPMScheduler.set_timesteps, torch.get_default_dtype()
    found = difference_from_diffusers(ddpm(solver="ddpm", spacing="leading"), 5)
    assert found is not None
    assert (dict(vars(module)), diffusers.DDPMScheduler.set_timesteps, torch.get_default_dtype()) == before
