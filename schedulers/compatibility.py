"""Which family, path, prediction, solver and spacing go together, as data that does not import torch.

A configuration is checked here before any process starts; `schedulers.build` turns checked settings into objects.
"""

import difflib
import math
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from schedulers.limits import check_values
from schedulers.settings import NoiseSchedulerSettings
from schedulers.tables import FAMILIES, PATHS, PREDICTIONS, SOLVERS, SPACINGS, families, spacings_of

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
        where = f"family={settings.family}" + (f" with path={path}" if len(families()[settings.family]) > 1 else "")
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
    _require_known("family", settings.family, FAMILIES)
    paths = families()[settings.family]
    path = settings.path or paths[0]
    if path not in paths:
        raise ValueError(f"path={path} does not belong to family={settings.family}. Use one of: {', '.join(paths)}")
    predictions, spacings = PATHS[path].predictions, spacings_of(path)
    prediction = settings.prediction or predictions[0]
    spacing = settings.spacing or spacings[0]
    solver = settings.solver or "euler"
    _require_supported(settings, path, "prediction", prediction, predictions, PREDICTIONS)
    _require_supported(settings, path, "spacing", spacing, spacings, SPACINGS.names())
    _require_supported(settings, path, "solver", solver, SOLVERS.names(), SOLVERS.names())
    full = replace(settings, path=path, prediction=prediction, solver=solver, spacing=spacing)
    _check_start(full)
    _check_steps(full, steps)
    _check_options(full)
    unused: dict[str, Any] = dict.fromkeys(unused_options(full))
    check_values(replace(full, **unused), steps)
    return full


def starts_at_pure_noise(s: NoiseSchedulerSettings) -> bool:
    """Return whether the first row of resolved settings has alpha = 0."""
    if s.path == "flow":
        first = {"linspace": s.sigma_first, "custom": s.sigmas[0] if s.sigmas else None}.get(
            s.spacing or "", s.sigma_max
        )
        return min(1.0 if first is None else first, 1.0 if s.sigma_cap is None else s.sigma_cap) >= 1
    if (levels := PATHS[s.path or ""].levels) is not None:
        return math.isinf(levels[1])
    return bool(s.zero_terminal_snr) and s.spacing in ("trailing", "linspace")


def spacing_options(s: NoiseSchedulerSettings) -> tuple[str, ...]:
    """Return the settings that the spacing of resolved settings uses, without those of its path."""
    flow = (s.path, s.spacing) == ("flow", "linspace")
    return FLOW_LINSPACE_OPTIONS if flow else SPACINGS[s.spacing or ""].options


def used_settings(s: NoiseSchedulerSettings) -> set[str]:
    """Return the names of the settings that have an effect on resolved settings."""
    used = {"family", "path", "prediction", "solver", "spacing", "clip", "threshold", "state_dtype", "plugin"}
    used |= {*PATHS[s.path or ""].options, *SOLVERS[s.solver or ""].options}
    return used | {*PREDICTION_OPTIONS.get(s.prediction or "", ()), *spacing_options(s)}


def scales_state(s: NoiseSchedulerSettings) -> bool:
    """Return whether resolved settings scale the first noise or the network's input."""
    if s.path == "flow":
        return not starts_at_pure_noise(s)
    return s.path in ("edm", "ve") or s.coordinates == "ve" or PATHS[s.path or ""].scales_state


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
            f"steps={steps} of a model distilled on original_steps={s.original_steps or 50}; use that number or fewer"
        )
    if s.spacing in ("leading", "trailing", "linspace") and s.path == "discrete_vp":
        _check_trained_timesteps(s, steps)


def _check_trained_timesteps(s: NoiseSchedulerSettings, steps: int) -> None:
    """Raise ValueError for more steps than the trained timesteps have, and name the most that they have."""
    trained, leading = 1000 if s.train_steps is None else s.train_steps, s.spacing == "leading"
    offset, spare = (s.steps_offset or 0) if leading else 0, leading and bool(s.spare_row)
    most = most_steps(trained, spare, offset, steps)
    if steps > most:
        taken = (", one of them spare" if spare else "") + (f" and steps_offset={offset}" if offset else "")
        fewer = f"use {most} or fewer, or" if most else "use another steps_offset, or"
        raise ValueError(
            f"steps={steps} with spacing={s.spacing} on a path of {trained} trained timesteps{taken}; "
            f"{fewer} spacing=karras"
        )


def most_steps(trained: int, spare_row: bool, steps_offset: int, wanted: int) -> int:
    """Return the largest number of steps, at most `wanted`, for which all timesteps are trained ones.

    Args:
        trained: The number N of trained timesteps.
        spare_row: Whether leading timesteps have one more row, which is dropped.
        steps_offset: The offset of leading timesteps; 0 for every other spacing.
        wanted: The number of steps asked for.

    Returns:
        The number of steps; 0 if there is none.
    """
    spare = int(spare_row)

    def fits(steps: int) -> bool:
        stride = trained // (steps + spare)
        return spare * stride + steps_offset >= 0 and (steps - 1 + spare) * stride + steps_offset < trained

    return next((steps for steps in range(min(wanted, trained - spare), 0, -1) if fits(steps)), 0)


def _check_options(s: NoiseSchedulerSettings) -> None:
    """Raise ValueError for options that contradict one another, and warn of options without effect."""
    if s.variance in ("learned_range", "learned") and not s.learned_variance:
        raise ValueError(f"variance={s.variance} needs a checkpoint with learned_variance; use variance=small or large")
    if s.shift is not None and (s.mu is not None or s.base_shift is not None):
        raise ValueError("shift, mu and base_shift with max_shift all set the shift; give only one of them")
    if (s.base_shift is None) != (s.max_shift is None):
        raise ValueError("base_shift and max_shift go together; give both, or shift alone")
    if s.threshold is not None and (s.clip is None or s.clip == 1):
        warnings.warn(
            f"threshold={s.threshold:g} clamps |x0| to 1 whatever its quantile is; set clip above 1",
            stacklevel=3,
        )
    if unused := unused_options(s):
        warnings.warn(
            f"{', '.join(unused)} has no effect with family={s.family}, path={s.path}, solver={s.solver}, "
            f"spacing={s.spacing}, prediction={s.prediction}; remove it or change one of these",
            stacklevel=3,
        )


def unused_options(s: NoiseSchedulerSettings) -> list[str]:
    """Return the options that resolved settings give and nothing uses; `schedulers.build` leaves them out."""
    used = used_settings(s)
    return [f.name for f in fields(s) if f.name not in used and getattr(s, f.name) is not None]


def check(
    family: str,
    prediction: str | None = None,
    solver: str | None = None,
    spacing: str | None = None,
    steps: int | None = None,
) -> NoiseSchedulerSettings:
    """Return `resolve` of the four names and a number of steps; raise ValueError if they do not go together."""
    return resolve(NoiseSchedulerSettings(family, prediction=prediction, solver=solver, spacing=spacing), steps)
