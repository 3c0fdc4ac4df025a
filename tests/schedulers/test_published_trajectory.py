"""Whole trajectories from a published configuration are diffusers' own, on a toy network with the same noise."""

from collections.abc import Callable

import diffusers
import pytest

from tests.fixtures.schedulers.parity import Case, compare
from tests.fixtures.schedulers.published_cases import CASES, bound

diffusers.utils.logging.set_verbosity_error()
THIRD = [pytest.param(case, marks=pytest.mark.slow if k % 3 else ()) for k, case in enumerate(CASES)]
"""Return all cases, two of three in the slow suite; every grid is in the default suite."""


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", THIRD, ids=str)
def test_the_formulas_are_the_same(case: Case) -> None:
    """With float32 read as float64 on both sides: what remains is the rounding of float64."""
    for difference in compare(case, tuple(n for n in (5, 20) if n <= case.most), wide=True):
        assert difference.state < 1e-9, difference
        assert difference.timesteps < 1e-9, difference


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", THIRD, ids=str)
def test_as_published_in_float32(case: Case, record_property: Callable[[str, object], None]) -> None:
    """Within 1e-5 of the largest value, except for the cases whose bound says why."""
    for difference in compare(case, tuple(n for n in (10, 50) if n <= case.most), wide=False):
        record_property("relative_error", difference.state)
        assert difference.state < bound(case), difference


@pytest.mark.parametrize(
    "change", [{"solver_order": 3}, {"timestep_spacing": "leading"}, {"prediction_type": "v_prediction"}]
)
def test_the_comparison_sees_another_solver_spacing_and_prediction(change: dict[str, object]) -> None:
    name = "DPMSolverMultistepScheduler"
    (difference,) = compare(Case(name), (10,), wide=True, mine=Case(name, change))
    assert difference.state > 1e-6
