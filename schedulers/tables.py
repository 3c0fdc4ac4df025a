"""The solvers, paths and spacings that a configuration can name, ours and those of plug-ins, as data without torch.

An entry says what makes the object and which settings that takes; `schedulers.build` calls it in the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Unpack

from schedulers.registry import Common, Registry, Target

FAMILIES = ("rectified_flow", "ddpm", "sgm")
PREDICTIONS = ("flow", "eps", "v", "x0", "score", "edm")
LEVEL_SPACINGS = ("karras", "exponential", "beta", "custom")


@dataclass(frozen=True)
class SolverEntry:
    """A solver.

    Attributes:
        make: What returns the solver (schedulers.solvers.base.Solver), called with the options by name.
        options: The options of `scheduler.solver` that it takes; one that is null is left out.
        given: Other settings of the noise scheduler that it takes, such as path; one that is null is left out.
        fixed: Arguments with fixed values.
    """

    make: Target
    options: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PathEntry:
    """A noise path, and what goes with it; the first prediction and the first spacing are the defaults.

    Attributes:
        make: What returns the path (schedulers.paths.base.NoisePath), called with the options by name.
        family: The family that it belongs to.
        predictions: The predictions that it supports.
        spacings: The spacings that it supports.
        options: The settings of `scheduler` that it takes; one that is null is left out.
        fixed: Arguments with fixed values.
        levels: The least and the largest sigma / alpha of a plug-in's path; None for ours, which follow from settings.
        scales_state: Whether a plug-in's path scales the first noise or the network's input.
    """

    make: Target
    family: str
    predictions: tuple[str, ...]
    spacings: tuple[str, ...]
    options: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    levels: tuple[float, float] | None = None
    scales_state: bool = False


@dataclass(frozen=True)
class SpacingEntry:
    """A spacing.

    Attributes:
        make: What returns the spacing (schedulers.spacing.Spacing), called with the options by name.
        options: The settings of `scheduler` that it takes; one that is null is left out.
        given: Other settings of the noise scheduler that it takes, such as path; one that is null is left out.
        paths: The paths of a plug-in's spacing; None for all. Those of ours are in the entries of the paths.
    """

    make: Target
    options: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    paths: tuple[str, ...] | None = ()


SOLVERS: Registry[SolverEntry] = Registry("solver", "scheduler.solver.name", "scheduler/solver")
PATHS: Registry[PathEntry] = Registry("path", "scheduler.path")
SPACINGS: Registry[SpacingEntry] = Registry("spacing", "scheduler.spacing")


def register_solver(
    name: str,
    make: Target,
    *,
    takes: tuple[str, ...] = (),
    given: tuple[str, ...] = (),
    fixed: Mapping[str, Any] | None = None,
    **common: Unpack[Common],
) -> None:
    """Register a solver, for scheduler/solver=NAME.

    Args:
        name: The solver's name.
        make: What returns the solver (schedulers.solvers.base.Solver): a class, a function, or `module:attribute`. It
            is called with options by name.
        takes: The options of `scheduler.solver` that it takes, besides options of its own; null ones are left out.
        given: Other settings of the noise scheduler that it takes, such as path; null ones are left out.
        fixed: Further arguments, with fixed values.
        **common: Options of its own, its layouts, and whether requests may share its forwards.
    """
    SOLVERS.register(name, SolverEntry(make, takes, given, fixed or {}), **common)


def register_path(
    name: str,
    make: Target,
    *,
    family: str,
    predictions: tuple[str, ...] = ("eps", "v", "x0", "score"),
    spacings: tuple[str, ...] = LEVEL_SPACINGS,
    takes: tuple[str, ...] = (),
    fixed: Mapping[str, Any] | None = None,
    levels: tuple[float, float] | None = None,
    scales_state: bool = False,
    **common: Unpack[Common],
) -> None:
    """Register a noise path, for scheduler.path=NAME.

    Args:
        name: The path's name.
        make: What returns the path (schedulers.paths.base.NoisePath). It is called with options by name.
        family: The family that it belongs to, whose denoiser of a checkpoint it uses.
        predictions: The predictions that it supports, the default first.
        spacings: The spacings that it supports, the default first.
        takes: The settings of `scheduler` that it takes, besides options of its own; null ones are left out.
        fixed: Further arguments, with fixed values.
        levels: The least and the largest sigma / alpha that it has; an infinite largest one is pure noise.
        scales_state: Whether the first noise or the network's input is scaled.
        **common: Options of its own, its layouts, and whether requests may share its forwards.

    Raises:
        ValueError: There is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"path {name!r}: there is no family {family!r}; use one of: {', '.join(FAMILIES)}")
    entry = PathEntry(make, family, predictions, spacings, takes, fixed or {}, levels, scales_state)
    PATHS.register(name, entry, **common)


def register_spacing(
    name: str,
    make: Target,
    *,
    takes: tuple[str, ...] = (),
    given: tuple[str, ...] = (),
    paths: tuple[str, ...] | None = None,
    **common: Unpack[Common],
) -> None:
    """Register a spacing, for scheduler.spacing=NAME.

    Args:
        name: The spacing's name.
        make: What returns the spacing (schedulers.spacing.Spacing). It is called with options by name.
        takes: The settings of `scheduler` that it takes, besides options of its own; null ones are left out.
        given: Other settings of the noise scheduler that it takes, such as path; null ones are left out.
        paths: The paths that support it; None for all.
        **common: Options of its own, its layouts, and whether requests may share its forwards.
    """
    SPACINGS.register(name, SpacingEntry(make, takes, given, paths), **common)


def families() -> dict[str, tuple[str, ...]]:
    """Return the paths of each family; the first is the default."""
    return {family: tuple(name for name, path in PATHS.items() if path.family == family) for family in FAMILIES}


def spacings_of(path: str) -> tuple[str, ...]:
    """Return the spacings that a path supports, the default first."""
    added = (name for name, entry in SPACINGS.items() if entry.paths is None or path in entry.paths)
    return tuple(dict.fromkeys((*PATHS[path].spacings, *added)))


_BUILD, _SOLVERS = "schedulers.build", "schedulers.solvers"
_VP_OPTIONS = ("beta_min", "beta_max", "t_last", "end", "learned_variance")
_DISCRETE_OPTIONS = ("train_steps", "beta_schedule", "beta_start", "beta_end", "zero_terminal_snr", "coordinates")
_SCORES = ("score", "eps", "x0", "v")

register_path(
    "flow",
    "schedulers.paths:FlowPath",
    family="rectified_flow",
    predictions=("flow", "v", "x0"),
    spacings=("linspace", *LEVEL_SPACINGS),
    takes=("round_tau", "learned_variance"),
)
register_path(
    "discrete_vp",
    f"{_BUILD}:discrete_vp_path",
    family="ddpm",
    predictions=("eps", "v", "x0"),
    spacings=("leading", "trailing", "linspace", *LEVEL_SPACINGS, "lcm"),
    takes=(*_DISCRETE_OPTIONS, "round_tau", "end", "learned_variance"),
)
register_path(
    "edm",
    f"{_BUILD}:edm_path",
    family="sgm",
    predictions=("edm", "score", "eps", "x0", "v", "flow"),
    takes=("sigma_data", "tau_map", "end", "learned_variance"),
)
register_path(
    "ve",
    f"{_BUILD}:ve_path",
    family="sgm",
    predictions=_SCORES,
    spacings=("uniform", *LEVEL_SPACINGS),
    takes=("sigma_min", "sigma_max", "end", "learned_variance"),
)
for _name in ("vp", "sub_vp"):
    register_path(
        _name,
        "schedulers.paths:ContinuousVPPath",
        family="sgm",
        predictions=_SCORES,
        spacings=("uniform", *LEVEL_SPACINGS),
        takes=_VP_OPTIONS,
        fixed={"sub": _name == "sub_vp"},
    )

_LEVELS = ("sigma_min", "sigma_max")
register_spacing(
    "linspace", f"{_BUILD}:linspace", takes=("integer_timesteps", "spare_row"), given=("path", "end"), paths=()
)
register_spacing("leading", "schedulers.spacing:Leading", takes=("steps_offset", "spare_row"), given=("end",), paths=())
register_spacing("trailing", "schedulers.spacing:Trailing", takes=("stride_target",), given=("end",), paths=())
register_spacing("uniform", f"{_BUILD}:uniform", takes=("t_last", "geometric_sigma"), given=("path", "end"), paths=())
register_spacing("karras", f"{_BUILD}:karras", takes=("rho", *_LEVELS), given=("path", "end"), paths=())
register_spacing("exponential", f"{_BUILD}:exponential", takes=_LEVELS, given=("path", "end"), paths=())
register_spacing("beta", f"{_BUILD}:beta", takes=_LEVELS, given=("path", "end"), paths=())
register_spacing("custom", f"{_BUILD}:custom", takes=("sigmas",), given=("path", "end"), paths=())
register_spacing("lcm", "schedulers.spacing:Distilled", takes=("original_steps",), given=("end",), paths=())

register_solver("euler", f"{_SOLVERS}.euler:Euler")
register_solver("ddim", f"{_SOLVERS}.euler:DDIM", takes=("eta",))
register_solver("ancestral", f"{_SOLVERS}.euler:DDIM", fixed={"eta": 1.0})
register_solver("ddpm", f"{_SOLVERS}.posterior:DDPM", takes=("variance", "final_noise"))
register_solver("heun", f"{_SOLVERS}.heun:Heun")
register_solver("dpm2", f"{_SOLVERS}.heun:DPM2", takes=("eta",))
_MULTISTEP, _SINGLESTEP = f"{_SOLVERS}.dpm:DPMSolver", f"{_SOLVERS}.dpm_singlestep:DPMSolverSinglestep"
_KIND = ("kind", "lower_order_final")
register_solver("dpmpp_1", _MULTISTEP, fixed={"order": 1})
register_solver("dpmpp_2m", _MULTISTEP, takes=_KIND, fixed={"order": 2})
register_solver("dpmpp_3m", _MULTISTEP, takes=("lower_order_final",), fixed={"order": 3})
register_solver("dpmpp_2m_sde", _MULTISTEP, takes=_KIND, fixed={"order": 2, "stochastic": True})
register_solver("dpmpp_2s", _SINGLESTEP, takes=_KIND, fixed={"order": 2})
register_solver("dpmpp_3s", _SINGLESTEP, takes=_KIND, fixed={"order": 3})
register_solver("unipc", f"{_SOLVERS}.unipc:UniPC", takes=("order", "b", "corrector", "lower_order_final"))
register_solver("deis", f"{_SOLVERS}.adams:DEIS", takes=("order", "lower_order_final"))
register_solver("pndm", f"{_BUILD}:pndm", takes=("runge_kutta",), given=("spacing",))
register_solver("lms", f"{_SOLVERS}.adams:LMS", takes=("order",))
register_solver("lcm", f"{_BUILD}:lcm", takes=("boundary", "timestep_scaling"), given=("path", "sigma_data"))
register_solver("tcd", f"{_SOLVERS}.lcm:TCD", takes=("gamma",))
register_solver("edm_churn", f"{_SOLVERS}.sde:EDMChurn", takes=("s_churn", "s_tmin", "s_tmax", "s_noise"))
register_solver("euler_maruyama", f"{_SOLVERS}.sde:EulerMaruyama")
register_solver("predictor_corrector", f"{_BUILD}:predictor_corrector", takes=("corrections", "snr"), given=("path",))
register_solver("rk45", f"{_SOLVERS}.rk45:RK45", takes=("rtol", "atol"))
