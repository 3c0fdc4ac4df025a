"""From plain settings to a NoiseScheduler: what the tables name is imported here, and called with its options."""

import math
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, cast

import torch

from schedulers import paths, prediction, spacing
from schedulers.compatibility import resolve, spacing_options, used_settings
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.registry import Registry, imported
from schedulers.settings import NoiseSchedulerSettings
from schedulers.solvers.adams import PNDM
from schedulers.solvers.base import Solver
from schedulers.solvers.lcm import LCM
from schedulers.solvers.sde import PredictorCorrector
from schedulers.tables import PATHS, SOLVERS, SPACINGS

NOT_OF_THE_PATH = (
    "end",
    "t_last",
    "round_tau",
    "learned_variance",
)  # a path allows them; spacing and prediction take them


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


def _make(
    registry: Registry[Any], name: str, s: NoiseSchedulerSettings, names: Collection[str], fixed: Mapping[str, Any]
) -> Any:
    """Return what an entry makes of the named settings, of those that are not None, and of its plug-in's options."""
    given = {key: value for key in names if (value := getattr(s, key)) is not None}
    own = (s.plugin or {}).get(name, {}) if registry.registration(name).options is not None else {}
    return imported(registry[name].make)(**given, **fixed, **own)


def _path(s: NoiseSchedulerSettings) -> paths.NoisePath:
    name = s.path or ""
    options = [option for option in PATHS[name].options if option not in NOT_OF_THE_PATH]
    if name == "edm":
        options += ["sigma_min", "sigma_max"]  # they are its spacing's, which always needs them
    path: paths.NoisePath = _make(PATHS, name, s, options, PATHS[name].fixed)
    return path


def _spacing(s: NoiseSchedulerSettings) -> spacing.Spacing:
    name = s.spacing or ""
    base: spacing.Spacing = _make(SPACINGS, name, s, (*spacing_options(s), *SPACINGS[name].given), {})
    return spacing.TimestepMap(base, cast(Literal["round", "floor"], s.round_tau)) if s.round_tau else base


def _solver(s: NoiseSchedulerSettings) -> Solver:
    name = s.solver or ""
    entry = SOLVERS[name]
    solver: Solver = _make(SOLVERS, name, s, (*entry.options, *entry.given), entry.fixed)
    return solver


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


def edm_path(sigma_min: float = 0.002, sigma_max: float = 80.0, **options: Any) -> paths.EDMPath:
    """Return the path of EDM, whose time is sigma."""
    return paths.EDMPath(t_min=sigma_min, t_max=sigma_max, **options)


def ve_path(sigma_max: float = 50.0, **options: Any) -> paths.GeometricVEPath:
    """Return the variance-exploding path of the score SDE."""
    return paths.GeometricVEPath(sigma_max=sigma_max, **options)


def discrete_vp_path(
    beta_schedule: paths.BetaSchedule = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    train_steps: int = 1000,
    zero_terminal_snr: bool = False,
    coordinates: str = "native",
) -> paths.NoisePath:
    """Return the path of DDPM on its trained indices."""
    betas = paths.betas(beta_schedule, beta_start, beta_end, train_steps)
    path = paths.DiscreteVPPath(paths.zero_terminal_snr(betas) if zero_terminal_snr else betas)
    return paths.VECoordinates(path) if coordinates == "ve" else path


def level_kind(path: str) -> spacing.LevelKind:
    """Return what a level of a spacing means on a path."""
    return "flow" if path == "flow" else "ratio"


def linspace(path: str, integer_timesteps: bool = True, **options: Any) -> spacing.Spacing:
    """Return even timesteps, or the even sigmas of a flow."""
    if path == "flow":
        return flow_linspace(**options)
    return spacing.Linspace(integer=integer_timesteps, **options)


def flow_linspace(
    shift: float = 1.0,
    mu: float | None = None,
    shift_terminal: float | None = None,
    base_shift: float | None = None,
    max_shift: float | None = None,
    base_tokens: int | None = None,
    max_tokens: int | None = None,
    **options: Any,
) -> spacing.Spacing:
    """Return the even sigmas of a flow, shifted by a number or with the image."""
    fixed = shift if mu is None else math.exp(mu)
    flow = spacing.FlowLinspace(shift=fixed, terminal=shift_terminal, **options)
    if base_shift is None or max_shift is None:
        return flow
    tokens: dict[str, Any] = {"base_tokens": base_tokens, "max_tokens": max_tokens}
    given = {name: count for name, count in tokens.items() if count is not None}
    return spacing.ResolutionShift(base_shift=base_shift, max_shift=max_shift, flow=flow, **given)


def uniform(path: str, geometric_sigma: bool | None = None, **options: Any) -> spacing.UniformTime:
    """Return even times; those of path=ve have geometric sigmas unless stated otherwise."""
    geometric = path == "ve" if geometric_sigma is None else geometric_sigma
    return spacing.UniformTime(geometric_sigma=geometric, **options)


def karras(path: str, **options: Any) -> spacing.Karras:
    """Return the levels of Karras et al. on a path."""
    return spacing.Karras(level_kind=level_kind(path), **options)


def exponential(path: str, **options: Any) -> spacing.Exponential:
    """Return levels even in their logarithm on a path."""
    return spacing.Exponential(level_kind=level_kind(path), **options)


def beta(path: str, **options: Any) -> spacing.Beta:
    """Return the levels of a beta distribution on a path."""
    return spacing.Beta(level_kind=level_kind(path), **options)


def custom(path: str, sigmas: Collection[float] = (), **options: Any) -> spacing.Custom:
    """Return the user's levels on a path."""
    return spacing.Custom(sigmas=tuple(sigmas), level_kind=level_kind(path), **options)


def pndm(spacing: str, **options: Any) -> PNDM:
    """Return PNDM, which knows whether the rows are whole timesteps."""
    return PNDM(whole_times=spacing in ("leading", "trailing"), **options)


def lcm(path: str, boundary: bool | None = None, **options: Any) -> LCM:
    """Return LCM, with the boundary scalings of its checkpoints on discrete timesteps."""
    return LCM(boundary=path == "discrete_vp" if boundary is None else boundary, **options)


def predictor_corrector(path: str, **options: Any) -> PredictorCorrector:
    """Return the predictor and corrector of the score SDE."""
    return PredictorCorrector(vp_scale=path in ("discrete_vp", "vp", "sub_vp"), **options)
