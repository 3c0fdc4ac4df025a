"""An option reaches only the part that it is for, and one that is said to have no effect has none."""

import warnings
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from schedulers.build import build
from schedulers.compatibility import resolve, unused_options
from schedulers.options import option_of
from schedulers.settings import NoiseSchedulerSettings
from schedulers.tables import PATHS, SOLVERS, families

SHIFTS = {"base_shift": 0.5, "max_shift": 1.15}
COMBINATIONS = [
    (family, path, spacing, solver)
    for family, several in families().items()
    for path in several
    for spacing in PATHS[path].spacings
    for solver in SOLVERS
    if spacing == PATHS[path].spacings[0] or solver in ("euler", "dpmpp_2m", "lcm", "unipc")
]


@pytest.mark.parametrize(
    ("settings", "changes", "tokens"),
    [
        (NoiseSchedulerSettings("rectified_flow", solver="dpmpp_2m", **SHIFTS), {"kind": "heun"}, 4096),
        (NoiseSchedulerSettings("ddpm", solver="unipc", spacing="beta"), {"b": "bh1"}, None),
    ],
)
def test_an_option_of_the_solver_leaves_the_rows_alone(
    settings: NoiseSchedulerSettings, changes: dict[str, Any], tokens: int | None
) -> None:
    """`kind` and `b` are also fields of two spacings, where they mean something else."""
    changed = build(replace(settings, **changes))
    assert torch.equal(changed.sigmas(10, tokens), build(settings).sigmas(10, tokens))
    assert changed.solver != build(settings).solver


def other_value(name: str) -> Any:
    """Return a value of an option that is not its default."""
    declared = next(f for f in fields(NoiseSchedulerSettings) if f.name == name)
    special: dict[str, Any] = {"sigmas": [0.9, 0.5], "b": "bh1", "kind": "heun", "variance": "large"}
    if name in special:
        return special[name]
    if "bool" in str(declared.type):
        return name not in ("lower_order_final", "corrector", "integer_timesteps")
    return option_of(declared).words[-1] if option_of(declared).words else 3 if "int" in str(declared.type) else 0.7


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize(("family", "path", "spacing", "solver"), COMBINATIONS)
def test_an_option_without_effect_has_none(family: str, path: str, spacing: str, solver: str) -> None:
    sigmas = [0.9, 0.5, 0.1] if spacing == "custom" else None
    plain = NoiseSchedulerSettings(family, path=path, spacing=spacing, solver=solver, sigmas=sigmas)
    try:
        before = repr(build(plain))
    except ValueError:
        return  # a combination that is refused
    full = resolve(plain)
    changes = {f.name: other_value(f.name) for f in fields(plain) if getattr(full, f.name) is None}
    unused = {*unused_options(replace(full, **changes))} - {"shift", "zero_terminal_snr"}  # they contradict others
    assert unused
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert repr(build(replace(plain, **{name: changes[name] for name in unused}))) == before
    assert "has no effect" in str(said[0].message)
