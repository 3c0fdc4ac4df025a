"""The data of a report's page: every run is a row, keys that vary are columns, and no text of a record is markup."""

import json
import re
from pathlib import Path

import msgspec
import pytest

from harness.cli import dispatch
from harness.metrics.unpaired import ratio_of_medians
from harness.records.provenance import Cpu
from harness.tasks import report
from harness.tasks.report.keys import layout_name, run_labels, varying_keys
from harness.tasks.report.page import Page, as_script, render
from harness.tasks.report.rows import ReportRow, read_table
from harness.tasks.report.scaling import scalings
from tests.fixtures.report_tree import (
    HOSTILE,
    Maker,
    copy_perturbed,
    make_loads,
    make_sweep,
    make_tree,
    page_image,
    write,
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make_tree(root)
    return root


@pytest.fixture(scope="module")
def rows(tree: Path) -> dict[str, ReportRow]:
    return {row.folder: row for row in read_table(tree).rows}


def test_every_run_is_a_row_with_its_state_and_error(rows: dict[str, ReportRow]) -> None:
    assert len(rows) == 15
    assert {name: row.state for name, row in rows.items() if row.state != "ok"} == {
        "broken": "failed",
        "refused": "failed",
        "large": "oom",
    }
    assert rows["refused"].error == "no such | solver"
    assert rows["large"].error == f"out of memory {HOSTILE}"
    assert "not a record of schema 2" in (rows["unreadable"].error or "")
    assert rows["unreadable"].notes == ["grid.png cannot be shown: UnidentifiedImageError"]
    assert rows["euler4"].error is None


def test_a_folder_without_a_status_is_a_row_too(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "record.json").write_text("{}")
    (row,) = read_table(tmp_path).rows
    assert row.state == "failed"
    assert (row.error or "").startswith("no readable status.json; ")


def test_numbers_are_the_record_s(rows: dict[str, ReportRow]) -> None:
    row = rows["euler8"]
    assert row.latency is not None
    assert (row.latency.median, *row.latency.ci95) == pytest.approx((200.0, 196.0, 204.0))
    assert row.stages == pytest.approx({"text_encoding": 10.0, "denoising": 160.0, "decoding": 30.0})
    assert (row.memory_mib, row.tflops, row.ceiling_share, row.comm_mb) == pytest.approx((100.0, 0.02, 0.4, 0.0))
    assert rows["layouts/dp2"].comm_mb == 2.5
    assert row.pixel is not None
    assert (row.pixel.rel_l2, row.verdict) == (0.1, "approximate")
    assert row.top1 is not None
    assert row.top1.hits == 42


def test_only_keys_that_vary_are_columns_and_a_run_without_a_record_has_them(
    tree: Path, rows: dict[str, ReportRow]
) -> None:
    assert set(read_table(tree).keys) == {
        "scheduler.solver.name",
        "task.name",
        "parallel",
        "attention.backend",
        "request.prompts",
        "request.steps",
        "request.batch_size",
        "request.samples_per_prompt",
    }
    assert rows["large"].values["request.batch_size"] == 64
    assert rows["layouts/usp4"].values["parallel"] == "ring2 ulysses2"
    assert rows["refused"].values == {}


def test_keys_that_follow_from_the_model_are_left_out_by_default() -> None:
    rows = [{"model.name": name, "model.path": name * 2, "request.steps": steps} for name, steps in ("a4", "b8")]
    assert varying_keys(rows, set()) == ["model.name", "request.steps"]
    assert varying_keys(rows, {"model.path"}) == ["model.name", "model.path", "request.steps"]
    rows.append({"model.name": "a", "model.path": "other", "request.steps": "4"})
    assert varying_keys(rows, set()) == ["model.name", "model.path", "request.steps"]


def test_every_run_has_a_name_of_its_own(rows: dict[str, ReportRow]) -> None:
    assert len({row.label for row in rows.values()}) == len(rows)
    configs = [{"solver.name": "heun", "steps": 4}, {"solver.name": "heun", "steps": 8}, {"solver.name": "heun"}, {}]
    named = run_labels(configs, ["solver.name", "steps"], ["a", "b", "c", "d"])
    assert named == ["steps=4", "steps=8", "c", "d"]
    assert run_labels([{"steps": 4}] * 2, ["steps"], ["a", "b"]) == ["a", "b"]
    assert run_labels([{"steps": k} for k in (4, 8, 4, 8)], ["steps"], list("abcd"))[0] == "steps=4 (a)"
    assert layout_name({"dp": 1, "cfg": 2, "tp": 1, "ring": 1, "ulysses": 4}) == "cfg2 ulysses4"


def test_a_layout_is_held_against_the_one_rank_run_of_the_same_everything_else(tree: Path) -> None:
    rows = read_table(tree).rows
    found = {row.folder: row.scaling for row in rows if row.scaling is not None}
    assert set(found) == {"layouts/dp2", "layouts/usp4", "compared/b"}
    assert {name: rows[each.base].folder for name, each in found.items()} == {
        "layouts/dp2": "layouts/single",
        "layouts/usp4": "layouts/single",
        "compared/b": "compared/a",
    }
    assert found["layouts/usp4"].speedup.value == pytest.approx(3.0)
    assert found["layouts/usp4"].efficiency == pytest.approx(0.75)
    low, high = found["layouts/usp4"].speedup.bounds
    assert 2.9 < low < 3.0 < high < 3.1


def test_of_several_one_rank_runs_the_one_beside_a_run_is_its_base() -> None:
    make = Maker()
    one, two = make.record({}, 100.0), make.record({"parallel.dp": 2}, 60.0, ranks=2)
    folders = [Path("first/a"), Path("second/a"), Path("second/b"), Path("third/b")]
    found = scalings(folders, dict(enumerate([one, one, two, two])))
    assert {place: each.base for place, each in found.items()} == {2: 1, 3: 0}
    assert scalings(folders, {2: two, 3: two}) == {}
    other = msgspec.structs.replace(one.provenance, cpu=Cpu("DEFAULT", []))
    assert scalings(folders, {0: msgspec.structs.replace(one, provenance=other), 2: two}) == {}


def test_a_ratio_of_medians_has_the_spread_of_both() -> None:
    steady, noisy = [10.0] * 9, [5.0, 4.0, 6.0, 5.0, 4.0, 6.0, 5.0, 4.0, 6.0]
    assert ratio_of_medians(steady, steady).ci95 == (1.0, 1.0)
    assert ratio_of_medians(steady, noisy).value == 2.0
    low, high = ratio_of_medians(steady, noisy).bounds
    assert low < 2.0 < high
    assert ratio_of_medians(noisy, steady).ci95 == pytest.approx((1 / high, 1 / low))
    assert ratio_of_medians(steady[:3], noisy).ci95 is None  # three repeats have no interval


def test_a_comparison_is_in_its_row(rows: dict[str, ReportRow]) -> None:
    comparison = rows["compared"].comparison
    assert comparison is not None
    assert comparison.ratios["request"].ratio == pytest.approx(1.82, abs=0.02)
    assert rows["compared"].notes == ["note of a comparison"]
    assert rows["compared"].latency is None


def test_loads_are_rows_without_times_of_one_request(tmp_path: Path) -> None:
    make_loads(tmp_path)
    table = read_table(tmp_path)
    found = {row.folder: row for row in table.rows}
    assert len(found) == 7
    assert {"load.rate", "serve.max_batch"} <= set(table.keys)
    row = found["batch1/4"]
    assert row.load is not None
    assert (row.load.throughput_per_s, row.values["load.rate"]) == (3.0, 4.0)
    assert (row.latency, row.nfe, row.stages, row.scaling) == (None, None, {}, None)
    compared = found["compared"].comparison
    assert compared is not None
    assert compared.headline == compared.ratios["answer"]


def test_a_row_has_what_baseline_history_and_rounding_need(rows: dict[str, ReportRow]) -> None:
    row = rows["heun4"]
    assert row.repeats_ms == pytest.approx([205.8, 214.2, 210.0, 212.1, 210.0])
    assert (row.started, row.command) == (
        "2026-11-30T00:00:00+00:00",
        "request.steps=4 scheduler.solver.name=heun",
    )
    assert row.rounding == 1e-5
    assert row.commit is None or re.fullmatch(r"[0-9a-f]{12}\+?", row.commit)
    assert rows["refused"].command is None


def test_overrides_that_change_no_number_are_not_part_of_a_command(tmp_path: Path) -> None:
    make = Maker()
    made = make.record({"request.steps": 4}, 100.0)
    others = ["task=bench", "logger=json", "notes=again", "+hydra.sweep.dir=x", "task.references=y", *made.overrides]
    write(tmp_path / "a", msgspec.structs.replace(made, overrides=others))
    (row,) = read_table(tmp_path).rows
    assert row.command == "request.steps=4 task=bench"


def test_thumbnails_of_many_runs_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Maker()
    for steps in (4, 8):
        write(tmp_path / f"{steps}", make.record({"request.steps": steps}, 100.0))
    monkeypatch.setattr("harness.tasks.report.rows.MANY", 2)
    grids = [row.grid for row in read_table(tmp_path).rows]
    assert [page_image(grid or "").size for grid in grids] == [(300, 233)] * 2


def test_copies_for_a_large_report_are_runs_of_their_own(tmp_path: Path) -> None:
    make_sweep(tmp_path / "sweep")
    copy_perturbed(tmp_path / "sweep", tmp_path / "copies", 30)
    table = read_table(tmp_path / "copies")
    assert {row.state for row in table.rows} == {"ok"}
    assert len({(row.values["request.seed"], row.label) for row in table.rows}) == 30


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour `#rrggbb` (WCAG 2.2)."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours, from 1 to 21 (WCAG 2.2)."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_markers_and_text_contrast_with_their_background(scheme: int) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    style = Path(report.__file__).with_name("page.css").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", style.split("@media")[scheme]))
    series = {name: value for name, value in colours.items() if name.startswith("series-")}
    assert len(series) == 8
    assert {name for name, value in series.items() if contrast(value, colours["card"]) < 3} == set()
    text = ("ink", "faint", "accent", "good", "fair", "bad")
    assert {name for name in text for on in ("card", "page") if contrast(colours[name], colours[on]) < 4.5} == set()


def test_grids_are_shrunk_and_embedded(rows: dict[str, ReportRow]) -> None:
    grid = rows["heun8"].grid
    assert grid is not None
    assert page_image(grid).size == (600, 467)
    assert rows["unreadable"].grid is None


def test_no_text_of_a_record_is_markup(tree: Path) -> None:
    table = read_table(tree)
    page = Page(f"runs {HOSTILE}", "today", ".", table.keys, table.rows)
    html = render(page, "/* plotly */")
    assert html.count("</script>") == html.count("<script") == 3
    assert "example.com" in html
    assert "\u2028" not in html
    embedded = re.search(r'type="application/json">(.*?)</script>', html, re.DOTALL)
    assert embedded is not None
    assert msgspec.json.decode(embedded[1], type=Page) == page
    assert json.loads(as_script(page))["root"] == f"runs {HOSTILE}"


def test_the_page_may_fetch_nothing() -> None:
    html = render(Page("runs", "today", ".", [], []), "")
    assert "default-src 'none'" in html
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", html)
    assert "http" not in html.replace('http-equiv="Content-Security-Policy"', "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["report.runs=nowhere"], "report.runs=nowhere: there is no such folder"),
        (["report.runs=empty"], "holds no run"),
        ([], "add report.runs=DIR"),
        (["report.runs=tree", "report.out=nowhere/page.html"], "cannot be written"),
        (["report.runs=tree", "rnus=tree"], "unknown key 'rnus'"),
        (["-m", "report.runs=tree,empty"], "without -m"),
    ],
)
def test_what_makes_no_page_is_one_line_and_no_folder(
    arguments: list[str],
    line: str,
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.tasks.report.page.plotly_script", lambda: "")
    (tmp_path / "empty").mkdir()
    (tmp_path / "tree").symlink_to(tree)
    before = sorted(tmp_path.rglob("*"))
    assert dispatch([*arguments, "task=report"]) == 2
    said = capsys.readouterr().err.strip()
    assert line in said
    assert "\n" not in said
    assert sorted(tmp_path.rglob("*")) == before


def test_the_page_is_written_beside_the_runs_or_to_a_given_path(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.tasks.report.page.plotly_script", lambda: "")
    out = tmp_path / "page.html"
    assert dispatch(["task=report", f"report.runs={tree}", f"report.out={out}"]) == 0
    assert "15 runs (2 failed, 12 ok, 1 oom)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]
    assert dispatch(["task=report", f"report.runs={tree}"]) == 0
    assert (tree / "report.html").stat().st_size == pytest.approx(out.stat().st_size, abs=99)
    found = [re.search(r'"base":"([^"]*)"', path.read_text()) for path in (out, tree / "report.html")]
    bases = [match and match[1] for match in found]
    assert bases[1] == "."
    assert (tmp_path / (bases[0] or "") / "euler4" / "record.json").samefile(tree / "euler4" / "record.json")
