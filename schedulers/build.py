"""From plain settings to a NoiseScheduler: the only place that branches on names."""

import math
from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar, cast

import torch

from schedulers import paths, prediction, spacing
from schedulers.compatibility import PATHS, resolve, spacing_options, used_settings
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.settings import SOLVERS, NoiseSchedulerSettings
from schedulers.solvers.adams import DEIS, LMS, PNDM
from schedulers.solvers.base import Solver
from schedulers.solvers.dpm import DPMSolver
from schedulers.solvers.dpm_singlestep import DPMSolverSinglestep
from schedulers.solvers.euler import DDIM, Euler
from schedulers.solvers.heun import DPM2, Heun
from schedulers.solvers.lcm import LCM, TCD
from schedulers.solvers.posterior import DDPM
from schedulers.solvers.rk45 import RK45
from schedulers.solvers.sde import EDMChurn, EulerMaruyama, PredictorCorrector
from schedulers.solvers.unipc import UniPC

Component = TypeVar("Component")


def build(settings: NoiseSchedulerSettings) -> NoiseScheduler:
    """Return the noise scheduler that the settings name.

    Args:
        settings: The settings; `None` values take their defaults.

    Returns:
        The noise scheduler, frozen.

    Raises:
        ValueError: As `compatibility.resolve`, or for a value out of range.
    """
    s = resolve(settings)
    used = used_settings(s)
    unused: dict[str, Any] = {f.name: None for f in fields(s) if f.name not in used}
    s = replace(s, **unused)
    state_dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(s.state_dtype or "")
    return NoiseScheduler(_path(s), _spacing(s), _prediction(s), _solver(s), state_dtype)


def _from_settings(kind: type[Component], s: NoiseSchedulerSettings, names: Collection[str], **fixed: Any) -> Component:
    """Return a `kind` whose fields take the named settings; a setting of None keeps the field's default."""
    chosen = [f.name for f in fields(kind) if f.name in names and f.name not in fixed]  # type: ignore[arg-type]
    return kind(**{name: value for name in chosen if (value := getattr(s, name)) is not None}, **fixed)


def _path(s: NoiseSchedulerSettings) -> paths.NoisePath:
    own = PATHS[s.path or ""].options
    match s.path:
        case "flow":
            return paths.FlowPath()
        case "edm":
            ends = {"t_min": s.sigma_min, "t_max": s.sigma_max}
            given = {name: value for name, value in ends.items() if value is not None}
            return _from_settings(paths.EDMPath, s, own, **given)
        case "ve":
            return _from_settings(paths.GeometricVEPath, s, own, sigma_max=50.0 if s.sigma_max is None else s.sigma_max)
        case "vp" | "sub_vp":
            return _from_settings(paths.ContinuousVPPath, s, own, sub=s.path == "sub_vp")
        case "discrete_vp":
            betas = paths.betas(
                cast(paths.BetaSchedule, s.beta_schedule or "linear"),
                1e-4 if s.beta_start is None else s.beta_start,
                0.02 if s.beta_end is None else s.beta_end,
                1000 if s.train_steps is None else s.train_steps,
            )
            path = paths.DiscreteVPPath(paths.zero_terminal_snr(betas) if s.zero_terminal_snr else betas)
            return paths.VECoordinates(path) if s.coordinates == "ve" else path
    raise ValueError(f"path={s.path} is not implemented")


def _spacing(s: NoiseSchedulerSettings) -> spacing.Spacing:
    base = _base_spacing(s)
    return spacing.TimestepMap(base, cast(Literal["round", "floor"], s.round_tau)) if s.round_tau else base


def _spacing_names(s: NoiseSchedulerSettings) -> tuple[str, ...]:
    """Return the settings of a spacing; a solver has others of the same names, such as `kind` and `b`."""
    return (*spacing_options(s), "end")


def _base_spacing(s: NoiseSchedulerSettings) -> spacing.Spacing:
    own = _spacing_names(s)
    level_kind: spacing.LevelKind = "flow" if s.path == "flow" else "ratio"
    match s.spacing:
        case "linspace" if s.path == "flow":
            return _flow_linspace(s)
        case "leading":
            return _from_settings(spacing.Leading, s, own)
        case "trailing":
            return _from_settings(spacing.Trailing, s, own)
        case "linspace":
            return _from_settings(spacing.Linspace, s, own, integer=s.integer_timesteps is not False)
        case "uniform":
            geometric = s.path == "ve" if s.geometric_sigma is None else s.geometric_sigma
            return _from_settings(spacing.UniformTime, s, own, geometric_sigma=geometric)
        case "karras":
            return _from_settings(spacing.Karras, s, own, level_kind=level_kind)
        case "exponential":
            return _from_settings(spacing.Exponential, s, own, level_kind=level_kind)
        case "beta":
            return _from_settings(spacing.Beta, s, own, level_kind=level_kind)
        case "custom":
            return _from_settings(spacing.Custom, s, own, level_kind=level_kind, sigmas=tuple(s.sigmas or ()))
        case "lcm":
            return _from_settings(spacing.Distilled, s, own)
    raise ValueError(f"spacing={s.spacing} is not implemented on path={s.path}")


def _flow_linspace(s: NoiseSchedulerSettings) -> spacing.Spacing:
    shift = math.exp(s.mu) if s.mu is not None else 1.0 if s.shift is None else s.shift
    own = _spacing_names(s)
    flow = _from_settings(spacing.FlowLinspace, s, own, shift=shift, terminal=s.shift_terminal)
    return flow if s.base_shift is None else _from_settings(spacing.ResolutionShift, s, own, flow=flow)


def _prediction(s: NoiseSchedulerSettings) -> prediction.Prediction:
    kinds: dict[str, prediction.Prediction] = {
        "eps": prediction.Eps(),
        "x0": prediction.X0(),
        "v": prediction.V(),
        "score": prediction.Score(),
        "flow": prediction.Flow(),
        "edm": prediction.EDM(0.5 if s.sigma_data is None else s.sigma_data, s.edm_sign or 1),
    }
    kind = kinds[s.prediction or ""]
    if s.threshold is not None:
        kind = prediction.Thresholded(kind, s.threshold, 1.0 if s.clip is None else s.clip)
    elif s.clip is not None:
        kind = prediction.Clipped(kind, s.clip)
    if s.learned_variance:
        kind = prediction.LearnedVariance(kind, use=s.variance in ("learned_range", "learned"))
    return kind


def _solver(s: NoiseSchedulerSettings) -> Solver:
    own = (*SOLVERS[s.solver or ""], "sigma_data")
    match s.solver:
        case "euler":
            return Euler()
        case "ddim":
            return _from_settings(DDIM, s, own)
        case "ancestral":
            return DDIM(1.0)
        case "ddpm":
            return _from_settings(DDPM, s, own)
        case "heun":
            return Heun()
        case "dpm2":
            return _from_settings(DPM2, s, own)
        case "dpmpp_1" | "dpmpp_2m" | "dpmpp_3m":
            return _from_settings(DPMSolver, s, own, order=int(s.solver[6]))
        case "dpmpp_2m_sde":
            return _from_settings(DPMSolver, s, own, order=2, stochastic=True)
        case "dpmpp_2s" | "dpmpp_3s":
            return _from_settings(DPMSolverSinglestep, s, own, order=int(s.solver[6]))
        case "unipc":
            return _from_settings(UniPC, s, own)
        case "deis":
            return _from_settings(DEIS, s, own)
        case "pndm":
            return _from_settings(PNDM, s, own, whole_times=s.spacing in ("leading", "trailing"))
        case "lms":
            return _from_settings(LMS, s, own)
        case "lcm":
            return _from_settings(LCM, s, own, boundary=s.path == "discrete_vp" if s.boundary is None else s.boundary)
        case "tcd":
            return _from_settings(TCD, s, own)
        case "edm_churn":
            return _from_settings(EDMChurn, s, own)
        case "euler_maruyama":
            return EulerMaruyama()
        case "predictor_corrector":
            return _from_settings(PredictorCorrector, s, own, vp_scale=s.path in ("discrete_vp", "vp", "sub_vp"))
        case "rk45":
            return _from_settings(RK45, s, own)
    raise ValueError(f"solver={s.solver} is not implemented")
