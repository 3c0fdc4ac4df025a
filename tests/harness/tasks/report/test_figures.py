"""The figures of the notebooks: errors within rounding are one level, labels are apart, and no data is no stop."""

from itertools import combinations
from pathlib import Path

import pytest

from harness.metrics.difference import Difference
from harness.metrics.summary import summarize
from harness.tasks.report.figures import fidelity, pareto, show_or_say, under_load, within_rounding
from harness.tasks.report.rows import ReportRow, ReportTable, read_table
from tests.fixtures.report_tree import apart, make_loads


def row(name: str, latency_ms: float, error: float, rounding: float = 1e-5) -> ReportRow:
    """Return a run with this latency and error."""
    times = summarize([latency_ms * factor for factor in (0.9, 1.0, 1.0, 1.1)])
    return ReportRow(name, name, "ok", None, {}, [], latency=times, pixel=apart(error), rounding=rounding)


def test_errors_within_rounding_are_one_level_and_make_no_front() -> None:
    noise = [row("a", 3.0, 1e-7), row("b", 2.0, 2e-7), row("c", 1.0, 9e-6), row("d", 4.0, 0.0)]
    assert [within_rounding(each) for each in noise] == [True] * 4
    assert pareto(noise) == []
    approximate = [row("e", 0.5, 1e-4), row("f", 2.5, 1e-3)]
    assert [each.label for each in pareto([*noise, *approximate])] == ["c", "e"]
    assert not within_rounding(row("a", 1.0, 1e-7, rounding=1e-8))


def test_labels_do_not_overlap() -> None:
    pytest.importorskip("matplotlib")
    rows = [row(f"configuration {k}", 100.0 + k % 3, 1e-7 if k % 2 else 0.1) for k in range(24)]
    figure = fidelity(ReportTable([], rows))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("configuration")]
    assert len(boxes) == 24
    inner = [box.shrunk(0.9, 0.9) for box in boxes]
    assert [pair for pair in combinations(inner, 2) if pair[0].overlaps(pair[1])] == []
    assert "within rounding" in {text.get_text() for text in axes.texts}


def test_the_load_figure_has_a_line_for_each_configuration(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    make_loads(tmp_path)
    left, right = under_load(read_table(tmp_path)).axes
    assert [line.get_label() for line in left.lines] == [
        "max_batch=1 p50",
        "max_batch=1 p99",
        "max_batch=8 p50",
        "max_batch=8 p99",
    ]
    assert list(right.lines[0].get_xdata()) == [2.0, 4.0, 8.0]
    assert list(right.lines[0].get_ydata()) == [2.0, 3.0, 3.0]


def test_a_notebook_goes_on_where_the_runs_have_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    empty = ReportTable([], [])
    assert show_or_say(lambda: fidelity(empty)) is None
    assert show_or_say(lambda: under_load(empty)) is None
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Nothing to show: no run was compared with a reference")
    assert said[1].startswith("Nothing to show: no run was loaded")
    assert show_or_say(lambda: Difference(0.0, 0.0)) == Difference(0.0, 0.0)
