"""Which family, path, prediction, solver and spacing go together, as data that does not import torch.

A configuration is checked here before any process starts; `schedulers.build` turns checked settings into objects.
"""

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal


@dataclass(frozen=True)
class PathRules:
    """What one path supports; the first of each tuple is the default.

    Attributes:
        predictions: The predictions that the path supports.
        spacings: The spacings that the path supports.
        options: The settings that the path uses.
    """

    predictions: tuple[str, ...]
    spacings: tuple[str, ...]
    options: tuple[str, ...]


FAMILIES: dict[str, tuple[str, ...]] = {
    "rectified_flow": ("flow",),
    "ddpm": ("discrete_vp",),
    "sgm": ("edm", "ve", "vp", "sub_vp"),
}
"""The paths of each family; the first is the default."""

LEVEL_SPACINGS = ("karras", "exponential", "beta", "custom")
CONTINUOUS_VP = PathRules(
    ("score", "eps", "x0", "v"),
    ("uniform", *LEVEL_SPACINGS),
    ("beta_min", "beta_max", "t_last", "end", "learned_variance"),
)
PATHS: dict[str, PathRules] = {
    "flow": PathRules(("flow", "v", "x0"), ("linspace", *LEVEL_SPACINGS), ()),
    "discrete_vp": PathRules(
        ("eps", "v", "x0"),
        ("leading", "trailing", "linspace", *LEVEL_SPACINGS, "lcm"),
        (
            "train_steps",
            "beta_schedule",
            "beta_start",
            "beta_end",
            "zero_terminal_snr",
            "coordinates",
            "end",
            "learned_variance",
        ),
    ),
    "edm": PathRules(("edm", "score", "eps", "x0", "v", "flow"), LEVEL_SPACINGS, ("sigma_data", "tau_map", "end")),
    "ve": PathRules(("score", "eps", "x0", "v"), ("uniform", *LEVEL_SPACINGS), ("sigma_min", "sigma_max", "end")),
    "vp": CONTINUOUS_VP,
    "sub_vp": CONTINUOUS_VP,
}

PREDICTIONS = ("flow", "eps", "v", "x0", "score", "edm")
SPACINGS = ("linspace", "leading", "trailing", "uniform", *LEVEL_SPACINGS, "lcm")

SOLVERS: dict[str, tuple[str, ...]] = {
    "euler": (),
    "ddim": ("eta",),
    "ancestral": (),
    "ddpm": ("variance", "final_noise"),
    "heun": (),
    "dpm2": ("eta",),
    "dpmpp_1": (),
    "dpmpp_2m": ("kind", "lower_order_final"),
    "dpmpp_3m": ("lower_order_final",),
    "dpmpp_2m_sde": ("kind", "lower_order_final"),
    "dpmpp_2s": ("kind", "lower_order_final"),
    "dpmpp_3s": ("kind", "lower_order_final"),
    "unipc": ("order", "b", "corrector", "lower_order_final"),
    "deis": ("order", "lower_order_final"),
    "pndm": ("runge_kutta",),
    "lms": ("order",),
    "lcm": ("boundary", "timestep_scaling"),
    "tcd": ("gamma",),
    "edm_churn": ("s_churn", "s_tmin", "s_tmax", "s_noise"),
    "euler_maruyama": (),
    "predictor_corrector": ("corrections", "snr"),
    "rk45": ("rtol", "atol"),
}
"""Each solver with the options that it uses."""

SPACING_OPTIONS: dict[str, tuple[str, ...]] = {
    "linspace": ("integer_timesteps", "spare_row"),
    "leading": ("steps_offset", "spare_row"),
    "trailing": ("stride_target",),
    "uniform": ("t_last", "geometric_sigma"),
    "karras": ("rho", "sigma_min", "sigma_max"),
    "exponential": ("sigma_min", "sigma_max"),
    "beta": ("sigma_min", "sigma_max"),
    "custom": ("sigmas",),
    "lcm": ("original_steps",),
}
FLOW_SHIFT_OPTIONS = ("shift", "mu", "base_shift", "max_shift", "base_tokens", "max_tokens")
FLOW_LINSPACE_OPTIONS = (*FLOW_SHIFT_OPTIONS, "sigma_last", "sigma_first", "spare_row", "sigma_cap", "shift_terminal")
PREDICTION_OPTIONS: dict[str, tuple[str, ...]] = {"edm": ("sigma_data", "edm_sign")}

NO_INDICES = "this path has no trained indices to pick from"
PURE_NOISE = "it starts at alpha = 0"
REASONS = {
    ("flow", "prediction", "eps"): "a flow starts at alpha = 0, where eps does not determine x0",
    ("flow", "prediction", "score"): "a flow starts at alpha = 0, where the score does not determine x0",
    ("flow", "prediction", "edm"): "its preconditioning belongs to a checkpoint trained at alpha = 1",
    ("flow", "spacing", "leading"): NO_INDICES,
    ("flow", "spacing", "trailing"): NO_INDICES,
    ("flow", "spacing", "lcm"): NO_INDICES,
    ("flow", "spacing", "uniform"): "evenly spaced times of a flow are spacing=linspace",
    **{
        (path, "solver", "tcd"): "its rule is for trained indices; use lcm"
        for path in ("flow", "edm", "ve", "vp", "sub_vp")
    },
    ("flow", "solver", "pndm"): f"{PURE_NOISE}, and PNDM divides by alpha",
    ("discrete_vp", "prediction", "flow"): "its checkpoints are trained on alpha^2 + sigma^2 = 1 with eps, v or x0",
    ("discrete_vp", "prediction", "score"): "its checkpoints predict eps, which is -sigma times the score",
    ("discrete_vp", "prediction", "edm"): "its checkpoints are trained without preconditioning",
    ("discrete_vp", "spacing", "uniform"): "evenly spaced trained indices are spacing=linspace, leading or trailing",
    ("edm", "spacing", "linspace"): "even steps in sigma put almost no step where the image forms",
    ("edm", "spacing", "uniform"): "even steps in sigma put almost no step where the image forms",
    **{("edm", "spacing", name): NO_INDICES for name in ("leading", "trailing", "lcm")},
    **{
        (path, "spacing", name): "evenly spaced times of this path are spacing=uniform"
        if name == "linspace"
        else NO_INDICES
        for path in ("ve", "vp", "sub_vp")
        for name in ("linspace", "leading", "trailing", "lcm")
    },
    **{
        (path, "prediction", "edm"): "its checkpoints are trained without EDM's preconditioning"
        for path in ("ve", "vp", "sub_vp")
    },
    **{
        (path, "prediction", "flow"): "its checkpoints predict the score or eps; a velocity belongs to a flow"
        for path in ("ve", "vp", "sub_vp")
    },
    **{
        (path, "solver", "pndm"): "its rule is for rows even in trained indices; use lms or deis"
        for path in ("edm", "ve")
    },
}
"""The reason why a known (path, part, name) is not supported."""

UNSUPPORTED_AT_PURE_NOISE = {
    "edm_churn": "no noise can be added above pure noise",
    "euler_maruyama": "the drift of the reverse SDE is infinite at alpha = 0",
    "pndm": "PNDM divides by alpha",
}
"""Solvers that cannot start at alpha = 0, with the reason."""


@dataclass(frozen=True)
class NoiseSchedulerSettings:
    """Plain parameters of a noise scheduler. None means the default of the path or solver, in brackets below.

    Attributes:
        family: The family, a key of FAMILIES.
        prediction: The meaning of the network's output [the first of the path's predictions].
        solver: The rule for one step [euler].
        spacing: The choice of the points [the first of the path's spacings].
        path: The noise path, one of the family's [its first].
        state_dtype: The dtype that the state is rounded to after each step, as in diffusers ["float32", not rounded].
        train_steps: The number of trained timesteps of ddpm [1000].
        beta_schedule: The noise schedule that a ddpm checkpoint was trained with [linear].
        beta_start: The first beta of ddpm [1e-4].
        beta_end: The last beta of ddpm [.02].
        zero_terminal_snr: Whether the betas of ddpm are rescaled to end at pure noise [False].
        learned_variance: Whether the network outputs twice the channels [False].
        beta_min: The first beta of sgm's vp and sub_vp [.1].
        beta_max: The last beta of sgm's vp and sub_vp [20].
        sigma_data: The standard deviation of the data, for sgm's edm [.5].
        tau_map: The timestep of sgm's edm: "log_sigma", "sigma", "flow_time" or "arctan" ["log_sigma"].
        edm_sign: The sign of the output of sgm's edm, 1 or -1 [1].
        clip: The limit that x0 is clamped to, [-clip, clip] [not clamped].
        threshold: The quantile of |x0| that x0 is clamped to per sample, in place of a fixed limit [not clamped].
        end: The last row, "clean" or "t_min" [clean].
        coordinates: The coordinates of the steps: "native", or "ve" for x / alpha [native].
        steps_offset: The offset of the timesteps of leading [0].
        integer_timesteps: Whether a linspace is rounded to trained indices [True].
        spare_row: Whether one more row is made and the last one dropped [False].
        stride_target: Whether first-order steps of trailing land at t - N // n [False].
        round_tau: The rounding of the timestep for the network, "round" or "floor" [not rounded].
        rho: The exponent of karras [7].
        sigma_min: The lowest level of karras, exponential and beta [the path's; .002 for edm, .001 for a flow]. For the
            path ve, its lowest sigma [.01].
        sigma_max: The highest level of karras, exponential and beta [the path's; 80 for edm, 1 for a flow]. For the
            path ve, its highest sigma [50].
        sigmas: The levels of custom, noise first, without 0.
        t_last: The time of the last evaluation of uniform [the path's].
        geometric_sigma: Whether uniform steps with sigmas even in their logarithm [True on ve].
        original_steps: The number of timesteps that a checkpoint was distilled on, for spacing=lcm [50].
        shift: The static shift of a flow's linspace [1].
        mu: The logarithm of that shift, in place of shift.
        base_shift: The mu at base_tokens, for a shift that grows with the resolution.
        max_shift: The mu at max_tokens.
        base_tokens: The smaller number of latent tokens [256].
        max_tokens: The larger number of latent tokens [4096].
        sigma_last: The unshifted sigma of the last evaluation of a flow's linspace [1 / steps].
        sigma_first: The unshifted sigma of its first evaluation [1].
        sigma_cap: The largest shifted sigma [1].
        shift_terminal: The last shifted sigma, to which the others are stretched [not stretched].
        eta: The strength of the noise of ddim and dpm2, 0 to 1 [0].
        variance: The variance of ddpm: "small", "large", "learned_range" or "learned" [small].
        final_noise: Whether ddpm adds noise at its last step too [False].
        kind: The variant of dpmpp, "midpoint" or "heun" [midpoint].
        order: The order of unipc [2], deis [2] and lms [4].
        b: The function B of unipc, "bh1" or "bh2" [bh2].
        corrector: Whether unipc corrects its steps [True].
        lower_order_final: Whether the last steps are of falling order [True].
        runge_kutta: Whether pndm starts with Runge-Kutta steps [False].
        boundary: Whether lcm has its boundary scalings [True on ddpm].
        timestep_scaling: The factor of the timestep in those scalings [10].
        gamma: The share of new noise in tcd [.3].
        s_churn: The amount of noise of edm_churn over all steps [40].
        s_tmin: The lowest sigma / alpha at which edm_churn adds noise [.05].
        s_tmax: The highest sigma / alpha at which edm_churn adds noise [50].
        s_noise: The factor of that noise [1.003].
        corrections: The number of Langevin steps per row of predictor_corrector [1].
        snr: The signal-to-noise ratio of these steps [.15].
        rtol: The relative tolerance of rk45 [1e-3].
        atol: The absolute tolerance of rk45 [1e-3].
    """

    family: str
    prediction: str | None = None
    solver: str | None = None
    spacing: str | None = None
    path: str | None = None
    state_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    # checkpoint defaults
    train_steps: int | None = None
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos"] | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool | None = None
    learned_variance: bool | None = None
    beta_min: float | None = None
    beta_max: float | None = None
    sigma_data: float | None = None
    tau_map: Literal["log_sigma", "flow_time", "sigma", "arctan"] | None = None
    edm_sign: int | None = None
    # prediction
    clip: float | None = None
    threshold: float | None = None
    # spacing
    end: Literal["clean", "t_min"] | None = None
    coordinates: Literal["native", "ve"] | None = None
    steps_offset: int | None = None
    integer_timesteps: bool | None = None
    spare_row: bool | None = None
    stride_target: bool | None = None
    round_tau: Literal["round", "floor"] | None = None
    rho: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigmas: Sequence[float] | None = None
    t_last: float | None = None
    geometric_sigma: bool | None = None
    original_steps: int | None = None
    shift: float | None = None
    mu: float | None = None
    base_shift: float | None = None
    max_shift: float | None = None
    base_tokens: int | None = None
    max_tokens: int | None = None
    sigma_last: float | None = None
    sigma_first: float | None = None
    sigma_cap: float | None = None
    shift_terminal: float | None = None
    # solver
    eta: float | None = None
    variance: Literal["small", "large", "learned_range", "learned"] | None = None
    final_noise: bool | None = None
    kind: Literal["midpoint", "heun"] | None = None
    order: int | None = None
    b: Literal["bh1", "bh2"] | None = None
    corrector: bool | None = None
    lower_order_final: bool | None = None
    runge_kutta: bool | None = None
    boundary: bool | None = None
    timestep_scaling: float | None = None
    gamma: float | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None
    corrections: int | None = None
    snr: float | None = None
    rtol: float | None = None
    atol: float | None = None


def _require_known(part: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {part} {name!r}; {hint}Choose one of: {', '.join(names)}")


def _require_supported(
    settings: NoiseSchedulerSettings, path: str, part: str, name: str, supported: Sequence[str], known: Sequence[str]
) -> None:
    _require_known(part, name, known)
    reason = REASONS.get((path, part, name))
    if reason is not None or name not in supported:
        allowed = ", ".join(other for other in supported if (path, part, other) not in REASONS)
        why = reason or "no such combination"
        where = f"family={settings.family}" + (f" with path={path}" if len(FAMILIES[settings.family]) > 1 else "")
        raise ValueError(f"{part}={name} cannot run on {where}: {why}. Use one of: {allowed}")


def resolve(settings: NoiseSchedulerSettings, steps: int | None = None) -> NoiseSchedulerSettings:
    """Return the settings with path, prediction, solver and spacing filled in, checked against each other.

    An option that has no effect gives a warning.

    Args:
        settings: The settings as the user gives them.
        steps: The number of steps to check as well, if known.

    Returns:
        The complete settings.

    Raises:
        ValueError: A name is unknown, a combination cannot run, or the number of steps is impossible. The message says
            what to change, with the nearest name or the reason.
    """
    _require_known("family", settings.family, tuple(FAMILIES))
    paths = FAMILIES[settings.family]
    path = settings.path or paths[0]
    if path not in paths:
        raise ValueError(f"path={path} does not belong to family={settings.family}. Use one of: {', '.join(paths)}")
    rules = PATHS[path]
    prediction = settings.prediction or rules.predictions[0]
    spacing = settings.spacing or rules.spacings[0]
    solver = settings.solver or "euler"
    _require_supported(settings, path, "prediction", prediction, rules.predictions, PREDICTIONS)
    _require_supported(settings, path, "spacing", spacing, rules.spacings, SPACINGS)
    _require_supported(settings, path, "solver", solver, tuple(SOLVERS), tuple(SOLVERS))
    full = replace(settings, path=path, prediction=prediction, solver=solver, spacing=spacing)
    _check_start(full)
    _check_steps(full, steps)
    _check_options(full)
    return full


def starts_at_pure_noise(s: NoiseSchedulerSettings) -> bool:
    """Return whether the first row of resolved settings has alpha = 0."""
    if s.path == "flow":
        first = {"linspace": s.sigma_first, "custom": s.sigmas[0] if s.sigmas else None}.get(
            s.spacing or "", s.sigma_max
        )
        return min(1.0 if first is None else first, 1.0 if s.sigma_cap is None else s.sigma_cap) >= 1
    return bool(s.zero_terminal_snr) and s.spacing in ("trailing", "linspace")


def _check_start(s: NoiseSchedulerSettings) -> None:
    """Raise ValueError for what cannot start at alpha = 0."""
    if s.zero_terminal_snr and s.prediction == "eps":
        raise ValueError("prediction=eps does not determine x0 at zero terminal SNR, where alpha = 0; use v or x0")
    if s.zero_terminal_snr and s.coordinates == "ve":
        raise ValueError("coordinates=ve divides by alpha, which is 0 at zero terminal SNR; use coordinates=native")
    if s.zero_terminal_snr and s.spacing in ("karras", "exponential", "beta") and s.sigma_max is None:
        raise ValueError(f"spacing={s.spacing} needs a finite sigma_max, and zero terminal SNR has none; set sigma_max")
    if s.solver in UNSUPPORTED_AT_PURE_NOISE and starts_at_pure_noise(s):
        key = "sigma_first=0.999" if s.spacing == "linspace" and s.path == "flow" else "sigma_max=0.999"
        change = f"set {key}" if s.path == "flow" else "use spacing=leading, or zero_terminal_snr=null"
        raise ValueError(
            f"solver={s.solver} cannot start at alpha = 0, where family={s.family} begins: "
            f"{UNSUPPORTED_AT_PURE_NOISE[s.solver]}; {change}, or another solver"
        )


def _check_steps(s: NoiseSchedulerSettings, steps: int | None) -> None:
    """Raise ValueError for a number of steps that the spacing cannot give."""
    if s.spacing == "custom" and not s.sigmas:
        raise ValueError("spacing=custom needs its levels; set sigmas=[...], falling, without 0")
    if steps is None:
        return
    if steps < 1:
        raise ValueError(f"steps={steps}; use at least 1")
    if s.spacing == "custom" and s.sigmas and len(s.sigmas) != steps:
        raise ValueError(f"steps={steps}, but {len(s.sigmas)} sigmas are given; use {len(s.sigmas)} steps")
    if s.spacing == "lcm" and steps > (s.original_steps or 50):
        raise ValueError(
            f"steps={steps} of a model distilled on {s.original_steps or 50} steps; use that number or fewer"
        )
    trained = s.train_steps or 1000
    if s.spacing in ("leading", "trailing", "linspace") and s.path == "discrete_vp" and steps > trained:
        raise ValueError(
            f"steps={steps} with spacing={s.spacing} on a path of {trained} trained timesteps; "
            f"use {trained} or fewer, or spacing=karras"
        )


def _check_options(s: NoiseSchedulerSettings) -> None:
    """Raise ValueError for options that contradict one another, and warn of options without effect."""
    if s.variance in ("learned_range", "learned") and not s.learned_variance:
        raise ValueError(f"variance={s.variance} needs a checkpoint with learned_variance; use variance=small or large")
    if s.shift is not None and (s.mu is not None or s.base_shift is not None):
        raise ValueError("shift, mu and base_shift with max_shift all set the shift; give only one of them")
    if (s.base_shift is None) != (s.max_shift is None):
        raise ValueError("base_shift and max_shift go together; give both, or shift alone")
    rules, path, spacing = PATHS[s.path or ""], s.path, s.spacing or ""
    used = {"family", "path", "prediction", "solver", "spacing", "clip", "threshold", "state_dtype"}
    used |= {*rules.options, *SOLVERS[s.solver or ""], *PREDICTION_OPTIONS.get(s.prediction or "", ())}
    used |= set(FLOW_LINSPACE_OPTIONS if (path, spacing) == ("flow", "linspace") else SPACING_OPTIONS[spacing])
    used |= {"round_tau"} if path in ("flow", "discrete_vp") else set()
    used -= {"beta_min", "beta_max"} if path == "ve" else set()
    unused = [f.name for f in fields(s) if f.name not in used and getattr(s, f.name) is not None]
    if unused:
        warnings.warn(
            f"{', '.join(unused)} has no effect with family={s.family}, path={path}, solver={s.solver}, "
            f"spacing={spacing}, prediction={s.prediction}; remove it or change one of these",
            stacklevel=3,
        )


def check(
    family: str,
    prediction: str | None = None,
    solver: str | None = None,
    spacing: str | None = None,
    steps: int | None = None,
) -> NoiseSchedulerSettings:
    """Return `resolve` of the four names and a number of steps; raise ValueError if they do not go together."""
    return resolve(NoiseSchedulerSettings(family, prediction, solver, spacing), steps)
