"""The table of a plan in a terminal of 80 columns: no layout's name and no number is cut."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from harness.config.plan import HardwareConfig
from harness.config.schema import ParallelConfig
from harness.costs.plan_file import LayoutPrediction, Plan
from harness.tasks.plan.table import layout_label, print_plan

LAYOUTS = (ParallelConfig(), ParallelConfig(dp=2, cfg=2, ring=4, ulysses=8), ParallelConfig(tp=8, displaced=True))


def predicted(layout: ParallelConfig) -> LayoutPrediction:
    """Return a prediction with made-up numbers."""
    return LayoutPrediction(
        layout, 128, 1, 1, 1, 1, 1, 1, 12_340_000_000, True, 1234.0, 4321.0, [], 98.7, 5678.0, 1e3, []
    )


@pytest.mark.parametrize("is_terminal", [True, False])
def test_no_layout_of_a_plan_is_cut_in_80_columns(is_terminal: bool, tmp_path: Path) -> None:
    plan = Plan(3, HardwareConfig(), [], {"model": {"name": "emoji"}}, [predicted(layout) for layout in LAYOUTS], [])
    console = Console(file=io.StringIO(), record=True, width=80, force_terminal=is_terminal)
    print_plan(plan, 12, tmp_path, console)
    text = console.export_text()
    assert all(f"\n{layout_label(layout)} " in text for layout in LAYOUTS)
    assert len(re.findall(r"5678\b", text)) == len(LAYOUTS)
    assert "…" not in text
    assert ("not shown in 80 columns: memory ms" in text) == is_terminal
    assert ("4321" not in text) == is_terminal
