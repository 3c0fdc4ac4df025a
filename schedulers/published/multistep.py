"""DPM-Solver, UniPC and DEIS as diffusers configures them, on trained indices, flows and EDM's noise levels."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from schedulers.conventions import InitStdOverride
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.paths import DiscreteVPPath, EDMPath, FlowPath, NoisePath, TauMap
from schedulers.prediction import EDM, LearnedVariance, Prediction, Thresholded
from schedulers.published import common
from schedulers.published.options import Options
from schedulers.published.refusals import LEARNED
from schedulers.solvers.adams import DEIS
from schedulers.solvers.base import Solver
from schedulers.solvers.dpm import DPMSolver
from schedulers.solvers.dpm_singlestep import DPMSolverSinglestep
from schedulers.solvers.unipc import UniPC
from schedulers.spacing import End, Exponential, FlowLinspace, Karras, Spacing, TimestepMap

Form = Literal["data", "noise"]
Kind = Literal["midpoint", "heun"]


def _prediction(o: Options, form: Form = "data") -> Prediction:
    """Return the prediction that the file names."""
    prediction = common.prediction(o, recompute_eps=form == "noise")
    learned = o.values.get("variance_type") in LEARNED and o.text("prediction_type") == "epsilon"
    return LearnedVariance(prediction, use=False) if learned else prediction


def _dpm_path_and_spacing(o: Options) -> tuple[NoisePath, Spacing]:
    last = common.last_row(o)
    if o.flag("use_flow_sigmas"):
        first = 1 - 1 / o.count("num_train_timesteps")
        return common.flow_path_and_spacing(o, FlowLinspace(o.number("flow_shift"), 0.0, first, spare_row=True))
    path, spacing = common.trained_path_and_spacing(
        o, last, last, rounded=o.values["beta_schedule"] != "squaredcos_cap_v2"
    )
    lowest = o.number("lambda_min_clipped")
    if lowest > -float("inf") and isinstance(path, DiscreteVPPath) and not isinstance(spacing, TimestepMap):
        t = torch.arange(len(path.betas), dtype=torch.float64)
        count = int(((path.alpha(t) / path.sigma(t)).log() >= lowest).sum())
        if count < len(path.betas):
            path = DiscreteVPPath(path.betas[:count])
    return path, spacing


def _dpm_solver(o: Options, single: bool = False) -> DPMSolver | DPMSolverSinglestep:
    """Return the solver of the four DPM-Solver classes; the cosine one has no algorithm_type and is stochastic."""
    algorithm = o.text("algorithm_type") if "algorithm_type" in o.values else "sde-dpmsolver++"
    order, kind = o.count("solver_order"), o.text("solver_type")
    variant: Kind = "heun" if kind == "heun" else "midpoint"
    form: Form = "noise" if algorithm == "dpmsolver" else "data"
    sde, lower = algorithm == "sde-dpmsolver++", o.flag("lower_order_final")
    if single:
        return DPMSolverSinglestep(order, variant, form, sde, lower)
    return DPMSolver(order, variant, form, sde, lower, o.flag("euler_at_final"), halve_d2=True)


def dpm(single: bool) -> Callable[[Options], NoiseScheduler]:
    """Return the builder of DPMSolverMultistepScheduler or DPMSolverSinglestepScheduler."""

    def build(o: Options) -> NoiseScheduler:
        solver = _dpm_solver(o, single)
        path, spacing = _dpm_path_and_spacing(o)
        return NoiseScheduler(path, spacing, _prediction(o, solver.form), solver)

    return build


def unipc(o: Options) -> NoiseScheduler:
    """Build UniPCMultistepScheduler."""
    last = common.last_row(o)
    skipped = tuple(int(i) for i in o.numbers("disable_corrector") or [])
    solver = UniPC(
        o.count("solver_order"),
        "bh1" if o.text("solver_type") == "bh1" else "bh2",
        "data" if o.flag("predict_x0") else "noise",
        o.flag("lower_order_final"),
        disable_corrector=skipped,
    )
    repeat: End = "clean" if last == "clean" else "repeat"
    path, spacing = (
        _unipc_flow_path_and_spacing(o, repeat)
        if o.flag("use_flow_sigmas")
        else common.trained_path_and_spacing(o, last, repeat, True)
    )
    return NoiseScheduler(path, spacing, _prediction(o), solver)


def _unipc_flow_path_and_spacing(o: Options, last: End) -> tuple[NoisePath, Spacing]:
    """Return flow rows that stop short of pure noise; karras levels are the trained sigma / alpha, on a flow."""
    total = o.count("num_train_timesteps")
    levels = common.level_spacing(o, last)
    if isinstance(levels, Karras):
        table = common.discrete_path(o)
        low, high = (table.sigma(t) / table.alpha(t) for t in (table.t_min, table.t_max))
        levels = replace(levels, sigma_min=levels.sigma_min or low, sigma_max=levels.sigma_max or high)
        return FlowPath(float(total)), InitStdOverride(TimestepMap(levels, "floor"), "unit")
    flow = FlowLinspace(
        o.number("flow_shift"), 1 / total, 1.0, True, 1 - 1e-6, o.optional("shift_terminal") or None, end=last
    )
    return common.flow_path_and_spacing(o, flow)


def deis(o: Options) -> NoiseScheduler:
    """Build DEISMultistepScheduler."""
    solver = DEIS(o.count("solver_order"), o.flag("lower_order_final"))
    if o.flag("use_flow_sigmas"):
        first = 1 - 1 / o.count("num_train_timesteps")
        path, spacing = common.flow_path_and_spacing(
            o, FlowLinspace(o.number("flow_shift"), 0.0, first, spare_row=True, end="repeat")
        )
    else:
        path, spacing = common.trained_path_and_spacing(o, "t_min", "repeat", True)
    return NoiseScheduler(path, spacing, _prediction(o, "noise"), solver)


def edm_path_and_spacing(o: Options, tau_map: TauMap) -> tuple[NoisePath, Spacing]:
    """Return path and spacing of the classes in EDM's coordinates; their first noise is that of the whole state."""
    path = EDMPath(o.number("sigma_data"), tau_map, o.number("sigma_min"), o.number("sigma_max"))
    last = common.last_row(o)
    schedules: dict[str, Spacing] = {
        "karras": Karras(o.number("rho"), end=last),
        "exponential": Exponential(end=last),
    }
    return path, InitStdOverride(schedules[o.text("sigma_schedule")], "state")


def edm_prediction(o: Options) -> Prediction:
    """Return EDM's preconditioning, with the sign of v for v_prediction."""
    signs = {"epsilon": 1, "v_prediction": -1}
    prediction = EDM(o.number("sigma_data"), signs[o.text("prediction_type")])
    if "thresholding" in o.values and o.flag("thresholding"):
        return Thresholded(prediction, o.number("dynamic_thresholding_ratio"), o.number("sample_max_value"))
    return prediction


def edm_dpm(tau_map: TauMap) -> Callable[[Options], NoiseScheduler]:
    """Return the builder of EDMDPMSolverMultistepScheduler or CosineDPMSolverMultistepScheduler."""

    def build(o: Options) -> NoiseScheduler:
        solver: Solver = _dpm_solver(o)
        path, spacing = edm_path_and_spacing(o, tau_map)
        return NoiseScheduler(path, spacing, edm_prediction(o), solver)

    return build
