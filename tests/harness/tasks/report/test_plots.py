"""A sweep's figure and table: the points are the records', compared at equal evaluations, and nothing is lost."""

import sys
from pathlib import Path

import msgspec
import pytest

from harness.metrics.intervals import IntervalEstimate, wilson
from harness.metrics.quality import Quality
from harness.records.record import Record, RunFolder, Status
from harness.tasks.report.families import main, separate_labels, table
from harness.tasks.report.markers import replace_between
from harness.tasks.report.sweep import best_within_budget, read_sweep
from tests.fixtures.records import record

N = 96


def run(root: Path, family: str, solver: str, steps: int, hits: int, distance: float, **settings: object) -> Record:
    """Write one finished run; a second-order solver has two evaluations in every step but the last."""
    share, gap = wilson(hits, N), IntervalEstimate(distance, (0.8 * distance, 1.3 * distance), N)
    quality = Quality("ab", N, 0, N, 1 / 256, share, share, None, gap, None, None)
    base = record()
    scheduler = {"family": family, "solver": {"name": solver, "eta": None}, **settings}
    made = msgspec.structs.replace(
        base,
        config={"scheduler": scheduler, "request": {"steps": steps, "prompts": ["rocket"]}},
        summary=msgspec.structs.replace(base.summary, nfe=2 * steps - 1 if solver == "heun" else steps),
        quality=quality,
    )
    name = "-".join([family, solver, str(steps), *(str(value) for value in settings.values())])
    folder = RunFolder.claim(root / name)
    folder.write_record(made)
    folder.finish(Status("ok"))
    return made


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Write two families, two solvers and two step counts; one run is refused, one has no score."""
    root = tmp_path / "sweep"
    for family, worse in (("sgm", 2.0), ("rectified_flow", 1.0)):
        for steps, distance in ((4, 0.4), (8, 0.1)):
            run(root, family, "ddim", steps, 90, worse * distance)
            run(root, family, "heun", steps, 88 + steps, worse * distance / 2)
    RunFolder.claim(root / "refused").finish(Status("failed", "no such | solver"))
    plain = RunFolder.claim(root / "plain")
    plain.write_record(msgspec.structs.replace(record(), notes=["quality is not scored: no prompt is a name"]))
    plain.finish(Status("ok"))
    return root


def test_points_are_the_records_and_the_others_say_why(tree: Path) -> None:
    sweep = read_sweep(tree)
    assert sweep.families == ["rectified_flow", "sgm"]
    assert sweep.lines == ["ddim", "heun"]
    assert len(sweep.points) == 8
    assert [(p.nfe, p.quality.distance.value) for p in sweep.line_points("sgm", "heun")] == [(7, 0.4), (15, 0.1)]
    assert sweep.left_out == {
        "refused": "failed: no such | solver",
        "plain": "not scored: quality is not scored: no prompt is a name",
    }


def test_a_setting_of_which_there_are_several_makes_a_line_each(tmp_path: Path) -> None:
    for order in (2, 3):
        run(tmp_path, "ddpm", "unipc", 4, 90, 0.1, order=order, rho=7)
    run(tmp_path, "ddpm", "ddim", 4, 90, 0.1, order=None, rho=7)
    assert read_sweep(tmp_path).lines == ["ddim", "unipc, order=2", "unipc, order=3"]


def test_a_budget_is_what_can_be_afforded(tree: Path) -> None:
    heun = read_sweep(tree).line_points("sgm", "heun")
    assert [getattr(best_within_budget(heun, budget), "nfe", None) for budget in (6, 7, 14, 15, 99)] == [
        None,
        7,
        7,
        15,
        15,
    ]


def test_the_table_marks_the_best_of_what_may_be_compared(tree: Path) -> None:
    rows = table(read_sweep(tree), [8]).splitlines()
    assert rows[2:6] == [
        "| rectified flow, at most 8 | `ddim` | 8 | 94 % (87 to 97) | **0.100 (0.080 to 0.130)** |",
        "| rectified flow, at most 8 | `heun` | 7 | **96 % (90 to 98)** | 0.200 (0.160 to 0.260) |",
        "| score SDE, at most 8 | `ddim` | 8 | 94 % (87 to 97) | **0.200 (0.160 to 0.260)** |",
        "| score SDE, at most 8 | `heun` | 7 | **96 % (90 to 98)** | 0.400 (0.320 to 0.520) |",
    ]
    assert rows[-1] == "Not in the table: 1 failed, 1 not scored."
    assert (
        table(read_sweep(tree), [99]).splitlines()[2].startswith("| rectified flow, at most 99 | `heun` | 15 | **100 %")
    )
    every = table(read_sweep(tree)).splitlines()
    assert sum(row.startswith(("| rect", "| score")) for row in every) == 8
    assert "**" not in "".join(every)  # nothing else has as many evaluations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"scheduler": {"family": "sgm", "solver": {"name": "heun", "eta": None}}}}, "two runs"),
        ({"gallery": "cd"}, "different galleries"),
        ({"prompts": ["castle"]}, "different prompts"),
    ],
)
def test_what_does_not_compare_is_refused(tree: Path, change: dict[str, object], message: str) -> None:
    other = run(tree, "ddpm", "ddim", 4, 90, 0.1)
    config, quality = other.config, other.quality
    assert quality is not None
    if "config" in change:
        config = {"scheduler": {"family": "sgm", "solver": {"name": "ddim", "eta": None}}, "request": config["request"]}
    if "prompts" in change:
        config = {**config, "request": {**config["request"], "prompts": change["prompts"]}}
    if "gallery" in change:
        quality = msgspec.structs.replace(quality, gallery="cd")
    RunFolder(tree / "ddpm-ddim-4").write_record(msgspec.structs.replace(other, config=config, quality=quality))
    with pytest.raises(ValueError, match=message):
        read_sweep(tree)


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0.1, 0.5], [0.1, 0.5]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.1, 0.48, 0.5, 0.52], [0.1, 0.4, 0.5, 0.6]),
        ([0.4, 0.45, 0.52], [0.35666, 0.45666, 0.55666]),
        ([0.98, 0.99, 1.0], [0.8, 0.9, 1.0]),
        ([0.0, 0.01, 0.9], [0.0, 0.1, 0.9]),
        ([], []),
    ],
)
def test_labels_are_moved_apart_and_no_further(heights: list[float], expected: list[float]) -> None:
    assert separate_labels(heights, 0.1) == pytest.approx(expected, abs=1e-4)


def test_a_page_keeps_all_but_what_is_between_the_markers() -> None:
    page = "top\n<!-- families:begin -->\nold\n<!-- families:end -->\nbottom <!-- other:begin -->\n"
    new = replace_between(page, "families", "new\n\nlines\n")
    assert new == page.replace("old", "new\n\nlines")
    assert replace_between(new, "families", "new\n\nlines\n") == new


@pytest.mark.parametrize(
    "page", ["", "<!-- a:begin -->", "<!-- a:end --><!-- a:begin -->", "<!-- a:begin --><!-- a:end --><!-- a:end -->"]
)
def test_a_page_without_its_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="the page needs <!-- a:begin --> once"):
        replace_between(page, "a", "new")


def test_the_command_writes_figure_table_and_page(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs triptych[notebooks]")
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- families:begin -->\n<!-- families:end -->\nb\n")
    for metric in ("distance", "top1"):
        assert main([str(tree), "--out", str(tmp_path / "out"), "--metric", metric, "--readme", str(page)]) == 0
        assert (tmp_path / "out" / "families.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "out" / "families.png").unlink()
    assert "1 runs left out: failed: no such | solver" in capsys.readouterr().err
    written = (tmp_path / "out" / "families.md").read_text()
    assert written == table(read_sweep(tree))
    assert page.read_text() == f"a\n<!-- families:begin -->\n{written}<!-- families:end -->\nb\n"


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunFolder.claim(tmp_path / "a").finish(Status("failed", "no weights"))
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no scored run (failed: no weights)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_table_is_there_and_the_line_names_the_extra(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(tree), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'triptych[notebooks]'" in capsys.readouterr().err
    assert (tmp_path / "out" / "families.md").exists()
