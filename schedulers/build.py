"""From plain settings to a NoiseScheduler: the one place that branches on names."""

import math
from dataclasses import fields
from typing import Any, TypeVar

import torch

from schedulers import paths, prediction, spacing
from schedulers.families import Settings, resolve
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.solvers.adams import DEIS, LMS, PNDM
from schedulers.solvers.base import Solver
from schedulers.solvers.dpm import DPMSolver
from schedulers.solvers.dpm_single import DPMSingle
from schedulers.solvers.euler import DDIM, Euler
from schedulers.solvers.heun import DPM2, Heun
from schedulers.solvers.lcm import LCM, TCD
from schedulers.solvers.posterior import DDPM
from schedulers.solvers.rk45 import RK45
from schedulers.solvers.sde import EDMChurn, EulerMaruyama, PredictorCorrector
from schedulers.solvers.unipc import UniPC

Part = TypeVar("Part")


def build(settings: Settings) -> NoiseScheduler:
    """The noise scheduler that the settings name. Raises ValueError as `families.resolve` does, or for a bad value."""
    s = resolve(settings)
    rounded = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(s.state_dtype or "")
    return NoiseScheduler(_path(s), _spacing(s), _prediction(s), _solver(s), rounded)


def _given(kind: type[Part], s: Settings, **fixed: Any) -> Part:
    """A dataclass whose fields are the settings of the same names; None leaves its own default."""
    names = [f.name for f in fields(kind) if f.name in Settings.__dataclass_fields__ and f.name not in fixed]  # type: ignore[arg-type]
    return kind(**{name: value for name in names if (value := getattr(s, name)) is not None}, **fixed)


def _path(s: Settings) -> paths.NoisePath:
    match s.path:
        case "flow":
            return paths.FlowPath()
        case "edm":
            ends = {"t_min": s.sigma_min, "t_max": s.sigma_max}
            given = {name: value for name, value in ends.items() if value is not None}
            return _given(paths.EDMPath, s, **given)
        case "ve":
            return _given(paths.GeometricVEPath, s, sigma_max=50.0 if s.sigma_max is None else s.sigma_max)
        case "vp" | "sub_vp":
            return _given(paths.ContinuousVPPath, s, sub=s.path == "sub_vp")
        case "discrete_vp":
            betas = paths.betas(
                s.beta_schedule or "linear",
                1e-4 if s.beta_start is None else s.beta_start,
                0.02 if s.beta_end is None else s.beta_end,
                1000 if s.train_steps is None else s.train_steps,
            )
            path = paths.DiscreteVPPath(paths.zero_terminal_snr(betas) if s.zero_terminal_snr else betas)
            return paths.VECoordinates(path) if s.coordinates == "ve" else path
    raise ValueError(f"path={s.path} has no object behind it")


def _spacing(s: Settings) -> spacing.Spacing:
    made = _rows(s)
    return spacing.Told(made, s.round_tau) if s.round_tau else made


def _rows(s: Settings) -> spacing.Spacing:
    of: spacing.Level = "flow" if s.path == "flow" else "ratio"
    match s.spacing:
        case "linspace" if s.path == "flow":
            return _flow_linspace(s)
        case "leading":
            return _given(spacing.Leading, s)
        case "trailing":
            return _given(spacing.Trailing, s)
        case "linspace":
            return _given(spacing.Linspace, s, integer=s.integer_timesteps is not False)
        case "uniform":
            geometric = s.path == "ve" if s.geometric_sigma is None else s.geometric_sigma
            return _given(spacing.UniformTime, s, geometric_sigma=geometric)
        case "karras":
            return _given(spacing.Karras, s, of=of)
        case "exponential":
            return _given(spacing.Exponential, s, of=of)
        case "beta":
            return _given(spacing.Beta, s, of=of)
        case "custom":
            return _given(spacing.Custom, s, of=of, sigmas=tuple(s.sigmas or ()))
        case "lcm":
            return _given(spacing.Distilled, s)
    raise ValueError(f"spacing={s.spacing} has no object behind it on path={s.path}")


def _flow_linspace(s: Settings) -> spacing.Spacing:
    shift = math.exp(s.mu) if s.mu is not None else 1.0 if s.shift is None else s.shift
    flow = _given(spacing.FlowLinspace, s, shift=shift, terminal=s.shift_terminal)
    return flow if s.base_shift is None else _given(spacing.ResolutionShift, s, flow=flow)


def _prediction(s: Settings) -> prediction.Prediction:
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


def _solver(s: Settings) -> Solver:
    match s.solver:
        case "euler":
            return Euler()
        case "ddim":
            return _given(DDIM, s)
        case "ancestral":
            return DDIM(1.0)
        case "ddpm":
            return _given(DDPM, s)
        case "heun":
            return Heun()
        case "dpm2":
            return _given(DPM2, s)
        case "dpmpp_1" | "dpmpp_2m" | "dpmpp_3m":
            return _given(DPMSolver, s, order=int(s.solver[6]))
        case "dpmpp_2m_sde":
            return _given(DPMSolver, s, order=2, stochastic=True)
        case "dpmpp_2s" | "dpmpp_3s":
            return _given(DPMSingle, s, order=int(s.solver[6]))
        case "unipc":
            return _given(UniPC, s)
        case "deis":
            return _given(DEIS, s)
        case "pndm":
            return _given(PNDM, s, whole_times=s.spacing in ("leading", "trailing"))
        case "lms":
            return _given(LMS, s)
        case "lcm":
            return _given(LCM, s, boundary=s.path == "discrete_vp" if s.boundary is None else s.boundary)
        case "tcd":
            return _given(TCD, s)
        case "edm_churn":
            return _given(EDMChurn, s)
        case "euler_maruyama":
            return EulerMaruyama()
        case "predictor_corrector":
            return _given(PredictorCorrector, s, vp_scale=s.path in ("discrete_vp", "vp", "sub_vp"))
        case "rk45":
            return _given(RK45, s)
    raise ValueError(f"solver={s.solver} has no object behind it")
