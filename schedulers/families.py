"""Which family, prediction, solver and spacing go together, as data that can be asked without importing torch.

A configuration is checked here before any process starts; `schedulers.build` turns checked settings into objects.
"""

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal


@dataclass(frozen=True)
class Family:
    """One row: a path, and the choices that make sense on it. The first of each tuple is the default."""

    path: Literal["flow", "discrete_vp", "edm"]
    predictions: tuple[str, ...]
    spacings: tuple[str, ...]
    options: tuple[str, ...]


PREDICTIONS = ("flow", "eps", "v", "x0", "edm")
SPACINGS = ("linspace", "leading", "trailing", "karras")

FAMILIES = {
    "rectified_flow": Family("flow", ("flow", "v", "x0"), ("linspace",), ()),
    "ddpm": Family(
        "discrete_vp",
        ("eps", "v", "x0"),
        ("leading", "trailing", "linspace", "karras"),
        ("train_steps", "beta_schedule", "beta_start", "beta_end", "coordinates", "end"),
    ),
    "sgm": Family("edm", ("edm", "eps", "x0", "v", "flow"), ("karras",), ("sigma_data", "tau_map", "end")),
}

SOLVERS: dict[str, tuple[str, ...]] = {"euler": (), "ddim": ("eta",), "heun": ()}
"""Each solver with the options it reads."""

SPACING_OPTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("flow", "linspace"): ("shift", "sigma_last"),
    ("discrete_vp", "leading"): ("steps_offset",),
    ("discrete_vp", "linspace"): ("integer_timesteps",),
    ("discrete_vp", "karras"): ("rho", "sigma_min", "sigma_max"),
    ("edm", "karras"): ("rho", "sigma_min", "sigma_max"),
}
PREDICTION_OPTIONS: dict[str, tuple[str, ...]] = {"edm": ("sigma_data", "edm_sign")}

REASONS = {
    ("rectified_flow", "prediction", "eps"): "a flow starts at alpha = 0, where eps says nothing about x0",
    ("rectified_flow", "prediction", "edm"): "its preconditioning belongs to a checkpoint trained at alpha = 1",
    ("rectified_flow", "spacing", "karras"): "a flow starts at an infinite sigma / alpha",
    ("rectified_flow", "spacing", "leading"): "a flow has no trained indices to pick from",
    ("rectified_flow", "spacing", "trailing"): "a flow has no trained indices to pick from",
    ("ddpm", "prediction", "flow"): "its checkpoints are trained on alpha^2 + sigma^2 = 1 with eps, v or x0",
    ("ddpm", "prediction", "edm"): "its checkpoints are trained without preconditioning",
    ("sgm", "spacing", "linspace"): "even steps in sigma put almost no step where the picture forms",
    ("sgm", "spacing", "leading"): "this path has no trained indices to pick from",
    ("sgm", "spacing", "trailing"): "this path has no trained indices to pick from",
}
"""Why a known (family, part, name) is refused. Solver rows belong here too; today every solver runs everywhere."""


@dataclass(frozen=True)
class Settings:
    """Plain parameters of a noise scheduler; None means the family's default, given here in brackets.

    prediction, spacing: the first of the family's row. solver: euler. clip: clamp x0 to [-clip, clip] [not clamped].
    eta: noise of the ddim solver, 0 to 1 [0]. shift: static shift of a flow grid [1]. sigma_last: unshifted sigma of
    a flow's last evaluation [1 / steps]. steps_offset: of leading [0]. integer_timesteps: round a linspace to trained
    indices [True]. rho [7], sigma_min and sigma_max [the path's; .002 and 80 for sgm]: of karras. end: "clean" or
    "t_min", the last row [clean]. train_steps [1000], beta_schedule [linear], beta_start [1e-4], beta_end [.02]: the
    trained noise of ddpm. coordinates: "native", or "ve" to step in x / alpha [native]. sigma_data [.5], tau_map
    ["log_sigma"; "sigma", "flow_time"], edm_sign [1]: what an sgm checkpoint was trained with.
    """

    family: str
    prediction: str | None = None
    solver: str | None = None
    spacing: str | None = None
    clip: float | None = None
    eta: float | None = None
    shift: float | None = None
    sigma_last: float | None = None
    steps_offset: int | None = None
    integer_timesteps: bool | None = None
    rho: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    end: Literal["clean", "t_min"] | None = None
    train_steps: int | None = None
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos"] | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    coordinates: Literal["native", "ve"] | None = None
    sigma_data: float | None = None
    tau_map: Literal["log_sigma", "flow_time", "sigma"] | None = None
    edm_sign: int | None = None


def _known(part: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {part} {name!r}; {hint}Choose one of: {', '.join(names)}")


def _legal(settings: Settings, part: str, name: str, legal: Sequence[str], known: Sequence[str]) -> None:
    _known(part, name, known)
    reason = REASONS.get((settings.family, part, name))
    if reason is not None or name not in legal:
        allowed = ", ".join(other for other in legal if (settings.family, part, other) not in REASONS)
        why = reason or "no such combination"
        raise ValueError(f"{part}={name} cannot run on family={settings.family}: {why}. Use one of: {allowed}")


def resolve(settings: Settings, steps: int | None = None) -> Settings:
    """The settings with prediction, solver and spacing filled in and found legal, with `steps` when it is given.

    Raises ValueError, naming what to change, for an unknown name (with the nearest one), a combination that cannot
    run (with the reason) and an impossible number of steps. Warns of an option that has no effect.
    """
    _known("family", settings.family, tuple(FAMILIES))
    family = FAMILIES[settings.family]
    prediction = settings.prediction or family.predictions[0]
    spacing = settings.spacing or family.spacings[0]
    solver = settings.solver or "euler"
    _legal(settings, "prediction", prediction, family.predictions, PREDICTIONS)
    _legal(settings, "spacing", spacing, family.spacings, SPACINGS)
    _legal(settings, "solver", solver, tuple(SOLVERS), tuple(SOLVERS))
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}; ask for at least 1")
    trained = settings.train_steps or 1000
    if steps is not None and family.path == "discrete_vp" and spacing != "karras" and steps > trained:
        raise ValueError(
            f"steps={steps} with spacing={spacing} on a path of {trained} trained timesteps; "
            f"ask for {trained} or fewer, or use spacing=karras"
        )
    used = {"family", "prediction", "solver", "spacing", "clip", *family.options, *SOLVERS[solver]}
    used |= {*SPACING_OPTIONS.get((family.path, spacing), ()), *PREDICTION_OPTIONS.get(prediction, ())}
    idle = [f.name for f in fields(settings) if f.name not in used and getattr(settings, f.name) is not None]
    if idle:
        warnings.warn(
            f"{', '.join(idle)} has no effect with family={settings.family}, solver={solver}, spacing={spacing}, "
            f"prediction={prediction}; remove it or change one of these",
            stacklevel=2,
        )
    return replace(settings, prediction=prediction, solver=solver, spacing=spacing)


def check(
    family: str,
    prediction: str | None = None,
    solver: str | None = None,
    spacing: str | None = None,
    steps: int | None = None,
) -> Settings:
    """resolve() for the four names and a number of steps: raises ValueError when they do not go together."""
    return resolve(Settings(family, prediction, solver, spacing), steps)
