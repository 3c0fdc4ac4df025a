"""The page of task=report in a browser: what a reader types and clicks changes the table, the charts and the front."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from harness.cli import dispatch
from tests.fixtures.chromium import MARKS, VIOLATIONS, accessibility_script, emulate, headless, widths
from tests.fixtures.report_tree import HOSTILE, copy_perturbed, make_caches, make_loads, make_sweep, make_tree

BARS = "return document.getElementById('stages').data.map(t => t.x.length)"
FRONT = "return [...document.querySelectorAll('#front li')].map(e => e.textContent.split(': ')[0])"
PLOTTED = """const symbols = document.getElementById('pareto').data.filter(t => t.customdata)
    .flatMap(t => t.marker.symbol.filter((_, k) => t.customdata[k] !== null));
return [symbols.filter(s => s !== 'x' && !s.endsWith('-open')).length, symbols.filter(s => s.endsWith('-open')).length,
    symbols.filter(s => s === 'x').length]"""
ROWS = "return [...document.querySelectorAll('#table tbody td.folder')].map(e => e.textContent)"
FETCHED = "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"
FITTED = (
    "return [...document.querySelectorAll('.chart:has(.main-svg)')].every(c => c._fullLayout.width === c.clientWidth)"
)
SECTIONS = "return [...document.querySelectorAll('main > section:not([hidden])')].map(s => s.id)"
POINTS = """return document.getElementById('pareto').data.filter(t => t.customdata).flatMap(t => t.x.map(
    (x, k) => ({x: x, y: t.y[k], id: t.customdata[k], name: t.name, panel: t.xaxis})).filter(p => p.id !== null))"""
SAVED = """const kept = [], make = URL.createObjectURL, click = HTMLAnchorElement.prototype.click;
URL.createObjectURL = (blob) => { kept.push(blob); return ''; };
HTMLAnchorElement.prototype.click = () => {};
document.getElementById(arguments[0]).click();
URL.createObjectURL = make; HTMLAnchorElement.prototype.click = click;
kept[0].text().then(arguments[1]);"""
ROOM = """return [...document.querySelectorAll('.chart:has(.main-svg)')].map(
    c => c.getBoundingClientRect().bottom - c.querySelector('.main-svg').getBoundingClientRect().bottom)"""

pytestmark = MARKS


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Open the page of `make_tree` in a headless browser."""
    pytest.importorskip("plotly")
    root = tmp_path_factory.mktemp("runs")
    make_tree(root)
    assert dispatch(["task=report", f"report.runs={root}"]) == 0
    with headless() as driver:
        driver.get((root / "report.html").as_uri())
        yield driver


@pytest.fixture
def fresh(browser: Any) -> Any:
    """Return the page as it opens."""
    browser.refresh()
    return browser


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def choose(browser: Any, selector: str, value: str) -> None:
    """Choose an option of a drop-down list."""
    find(browser, f"{selector} option[value='{value}']").click()


def test_it_opens_with_every_run_and_fetches_nothing(fresh: Any) -> None:
    assert len(fresh.execute_script(ROWS)) == 15
    assert find(fresh, "#count").text == "15 of 15 runs"
    assert fresh.execute_script(BARS) == [11, 11, 11]
    assert fresh.execute_script(PLOTTED) == [4, 1, 1]  # on the front, beaten, failed
    assert len(fresh.find_elements("css selector", "#grids img")) == 11
    assert fresh.get_log("browser") == []
    assert fresh.execute_script(FETCHED) == []


def test_hostile_text_is_text(fresh: Any) -> None:
    shown = find(fresh, "#note-list").get_attribute("textContent")
    assert HOSTILE in shown
    assert "prompts=<b>x</b></script>" in find(fresh, "#stages").get_attribute("textContent")
    assert fresh.find_elements("css selector", "main b, main script, svg script, svg a") == []
    assert len(fresh.find_elements("css selector", "script")) == 3


def test_words_filter_table_charts_and_front(fresh: Any) -> None:
    find(fresh, "#words").send_keys("steps=8 EULER")
    assert fresh.execute_script(ROWS) == ["euler8"]
    assert fresh.execute_script(BARS) == [1, 1, 1]
    assert fresh.execute_script(FRONT) == ["steps=8"]
    find(fresh, "#words").send_keys(" nothing")
    assert fresh.execute_script(ROWS) == []
    assert fresh.execute_script(SECTIONS) == ["runs", "absent"]
    assert "Latency by stage\nNo run shown" in find(fresh, "#absent-list").text
    find(fresh, "button[type=reset]").click()
    assert len(fresh.execute_script(ROWS)) == 15
    assert fresh.execute_script(BARS) == [11, 11, 11]
    assert fresh.get_log("browser") == []


def test_a_drop_down_filters(fresh: Any) -> None:
    select = find(fresh, "[data-pick=parallel]")
    find(select, "option[value=dp2]").click()
    assert fresh.execute_script(ROWS) == ["layouts/dp2"]
    assert find(fresh, "#speedups tbody").text.split()[-2:] == ["93.8", "%"]
    find(select, "option[data-all]").click()
    find(fresh, "[data-pick=state] option[value=oom]").click()
    assert fresh.execute_script(ROWS) == ["large"]
    assert "<b>x</b>" in find(fresh, "#table td.error").text


def test_a_heading_sorts_table_and_charts_by_mouse_and_by_key(fresh: Any) -> None:
    find(fresh, "[data-sort=latency]").click()
    rising = fresh.execute_script(ROWS)
    assert rising[:3] == ["broken", "euler4", "layouts/usp4"]
    assert rising[10] == "heun8"
    assert find(fresh, "th:has([data-sort=latency])").get_attribute("aria-sort") == "ascending"
    totals = "return document.getElementById('stages').data[1].x"
    assert fresh.execute_script(totals) == sorted(fresh.execute_script(totals))
    fresh.switch_to.active_element.send_keys("\ue007")  # Enter: the heading has kept the focus
    falling = fresh.execute_script(ROWS)
    assert falling[0] == "heun8"
    assert falling[11:] == rising[11:]  # runs without a latency are last either way


def test_the_front_is_of_the_metric_that_is_chosen(fresh: Any) -> None:
    ids = "return document.getElementById('pareto').layout.yaxis.title.text"
    choose(fresh, "#cost", "latency")
    fronts = {}
    for metric in ("rel_l2", "psnr_db", "distance", "top1"):
        choose(fresh, "#metric", metric)
        fronts[metric] = (fresh.execute_script(ids).split(",")[0], fresh.execute_script(FRONT))
    assert fronts["rel_l2"][0] == "pixel error"
    assert fronts["psnr_db"][0] == "PSNR"
    assert fronts["rel_l2"][1] == fronts["psnr_db"][1]
    assert [name for name in fronts["rel_l2"][1] if not name.startswith("prompts")] == [
        "steps=4",
        "steps=8",
        "heun steps=8",
    ]
    assert fronts["top1"][1] == [
        "steps=4",
        "steps=8",
        "heun steps=8",
    ]  # the broken run is equally good and faster, but failed
    assert fronts["distance"][1] == fronts["top1"][1]
    assert fresh.get_log("browser") == []


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows(fresh: Any, width: int, scheme: str) -> None:
    emulate(fresh, width, scheme)
    waiting = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait(fresh, 20)
    waiting.until(lambda page: page.execute_script(FITTED))
    whole, inner = widths(fresh)
    assert whole <= inner <= width
    ink = fresh.execute_script("return document.getElementById('stages').layout.font.color")
    assert ink == ("#e4e7ea" if scheme == "dark" else "#1d2125")
    assert all(below >= -1 for below in fresh.execute_script(ROOM))


def opened(browser: Any, make: Callable[[Path], Any], folder: Path) -> Iterator[Any]:
    """Open the page of a tree that is made in a folder; go back to the earlier page afterwards."""
    before = browser.current_url
    make(folder)
    assert dispatch(["task=report", f"report.runs={folder}"]) == 0
    browser.get((folder / "report.html").as_uri())
    yield browser
    browser.get(before)


@pytest.fixture
def loads(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Open the page of `make_loads`; go back to the earlier page afterwards."""
    yield from opened(browser, make_loads, tmp_path)


def test_a_line_for_each_configuration_bends_where_requests_come_faster_than_answers(loads: Any) -> None:
    lines = loads.execute_script(
        "return document.getElementById('curve').data.map(t => [t.name, t.x, t.y[0] < t.y.at(-1)])"
    )
    assert lines == [
        ["max_batch=1 p50", [2, 3, 3], True],
        ["max_batch=1 p99", [2, 3, 3], True],
        ["max_batch=8 p50", [2, 4, 8], False],
        ["max_batch=8 p99", [2, 4, 8], False],
    ]
    worth = [row.text for row in loads.find_elements("css selector", "#speedups tbody th")]
    assert [text.rpartition(", ")[2] for text in worth] == ["throughput", "p50 under load", "p99 under load"]
    assert find(loads, "[data-sort=throughput]").text == "answers/s"
    assert "5 busy" in find(loads, "#table tbody").text
    find(loads, "#words").send_keys("max_batch=8")
    assert len(loads.execute_script("return document.getElementById('curve').data")) == 2
    assert loads.get_log("browser") == []
    assert loads.execute_script(FETCHED) == []


@pytest.fixture
def caches(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Open the page of `make_caches`; go back to the earlier page afterwards."""
    yield from opened(browser, make_caches, tmp_path)


def test_a_cached_run_stands_beside_a_plain_one_of_fewer_steps(caches: Any) -> None:
    cells = (
        "return [...document.querySelectorAll('#baselines tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    better, worse = caches.execute_script(cells)
    assert better == [
        "first_block threshold=0.1",
        "8",
        "200",
        "0.05",
        "none steps=5",
        "2",
        "100",
        "0.3",
        "0.2",
        "cache",
    ]
    assert (worse[0], worse[-1]) == ("first_block threshold=0.3", "fewer steps")
    assert "16 of 40 branches" in find(caches, "#table tbody").text
    find(caches, "#words").send_keys("steps=5")
    assert caches.execute_script(cells) == []
    assert "No run shown has a cache" in find(caches, "#absent-list").text
    assert caches.get_log("browser") == []


@pytest.fixture
def sweep(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Open the page of `make_sweep`; go back to the earlier page afterwards."""
    yield from opened(browser, make_sweep, tmp_path)


def test_the_first_figure_of_a_sweep_of_solvers_is_quality_against_evaluations(sweep: Any) -> None:
    assert sweep.execute_script(SECTIONS)[:2] == ["runs", "tradeoff"]
    chosen = {name: find(sweep, f"#{name}").get_property("value") for name in ("metric", "cost", "colour", "facet")}
    assert chosen == {
        "metric": "distance",
        "cost": "nfe",
        "colour": "scheduler.solver.name",
        "facet": "scheduler.family",
    }
    points = sweep.execute_script(POINTS)
    assert len(points) == 24
    assert {point["panel"] for point in points} == {"x", "x2"}
    assert {point["name"] for point in points} == {"euler", "heun"}
    assert sweep.execute_script("return document.getElementById('pareto')._fullLayout.xaxis.type") == "log"
    choose(sweep, "#facet", "")
    choose(sweep, "#colour", "scheduler.family")
    points = sweep.execute_script(POINTS)
    assert {point["panel"] for point in points} == {"x"}
    assert {point["name"] for point in points} == {"ddpm", "rectified_flow"}
    assert sweep.get_log("browser") == []


def test_errors_within_rounding_are_one_level_and_no_front(sweep: Any) -> None:
    choose(sweep, "#metric", "rel_l2")
    choose(sweep, "#cost", "latency")
    heights: dict[str, set[float]] = {"euler": set(), "heun": set()}
    for point in sweep.execute_script(POINTS):
        heights[point["name"]].add(point["y"])
    assert len(heights["heun"]) == 1
    assert len(heights["euler"]) == 3
    assert max(heights["heun"]) < min(heights["euler"])
    assert sweep.execute_script("return document.getElementById('pareto')._fullLayout.xaxis.type") == "log"
    find(sweep, "#words").send_keys("solver.name=heun ")
    assert sweep.execute_script(FRONT) == []
    assert sweep.execute_script(PLOTTED) == [0, 12, 0]
    assert "No front: the runs are equally good." in find(sweep, "#unscored").text


def test_a_baseline_adds_a_ratio_with_its_interval(sweep: Any) -> None:
    assert sweep.find_elements("css selector", "[data-sort=ratio]") == []
    choose(sweep, "#baseline", "key:scheduler.solver.name=euler")
    find(sweep, "[data-sort=ratio]").click()
    cells = "return rows.map(r => [r.values['scheduler.solver.name'], baselineRatio(r).value, baselineRatio(r).ci95])"
    for solver, ratio, (low, high) in sweep.execute_script(cells):
        assert ratio == pytest.approx(1.0 if solver == "euler" else 0.5)
        assert 0.9 * ratio < low <= ratio <= high < 1.1 * ratio
    column = [text for text in find(sweep, "#table tbody").text.splitlines() if "baseline" in text]
    assert len(column) == 12  # a run is its own baseline
    choose(sweep, "#baseline", "run:0")
    assert sweep.execute_script("return baselineRatio(rows[12]).value") == pytest.approx(1.25)


def test_the_interval_of_a_baseline_is_that_of_python(fresh: Any) -> None:
    found = (
        "const row = rows.find(r => r.scaling); return [latencyRatio(rows[row.scaling.base], row), row.scaling.speedup]"
    )
    ours, theirs = fresh.execute_script(found)
    assert ours["value"] == pytest.approx(theirs["value"])
    assert ours["ci95"] == pytest.approx(theirs["ci95"], rel=0.01)


def test_the_table_shows_quality_before_it_scrolls_in_rows_of_32_pixels(sweep: Any) -> None:
    emulate(sweep, 1400, "light")
    heights = "return [...document.querySelectorAll('#table tbody tr')].map(r => r.getBoundingClientRect().height)"
    assert set(sweep.execute_script(heights)) == {32}
    edges = """const region = document.querySelector('#table').parentElement.getBoundingClientRect();
    return ['latency', 'nfe', 'rel_l2', 'distance'].map(key => region.right
        - document.querySelector(`th:has([data-sort=${key}])`).getBoundingClientRect().right)"""
    assert min(sweep.execute_script(edges)) >= 0


def test_the_runs_shown_are_saved_as_csv_and_json(fresh: Any) -> None:
    find(fresh, "#words").send_keys("steps=8")
    rows = list(csv.DictReader(io.StringIO(fresh.execute_async_script(SAVED, "csv"))))
    assert [row["folder"] for row in rows] == fresh.execute_script(ROWS)
    heun = next(row for row in rows if row["folder"] == "heun8")
    assert (heun["latency, ms"], heun["latency, ms low"], heun["request.steps"]) == ("400", "392", "8")
    saved = json.loads(fresh.execute_async_script(SAVED, "json"))
    assert [row["folder"] for row in saved["rows"]] == [row["folder"] for row in rows]
    assert "grid" not in saved["rows"][0]
    find(fresh, "button[type=reset]").click()
    prompts = [row["request.prompts"] for row in csv.DictReader(io.StringIO(fresh.execute_async_script(SAVED, "csv")))]
    assert HOSTILE in prompts
    assert fresh.get_log("browser") == []


def test_a_run_leads_to_its_folder(fresh: Any) -> None:
    links = fresh.execute_script(
        "return [...document.querySelectorAll('#table tbody th a')].map(a => [a.href, a.title])"
    )
    assert len(links) == 15
    for address, folder in links:
        place = Path(unquote(urlsplit(address).path))
        assert (place / "status.json").is_file()
        assert place.as_posix().endswith(folder)


def test_two_sweeps_stand_side_by_side(sweep: Any) -> None:
    assert [find(sweep, f"#{name}").get_property("value") for name in ("first", "second")] == ["sweep0", "sweep1"]
    cells = "return [...document.querySelectorAll('#pairs tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    pairs = sweep.execute_script(cells)
    assert len(pairs) == 12
    assert {pair[3][:4] for pair in pairs} == {"1.25"}
    choose(sweep, "#second", "sweep0")
    assert sweep.execute_script(cells) == []
    assert not find(sweep, "#ratios").is_displayed()


def test_history_shows_one_command_at_several_times(sweep: Any) -> None:
    lines = "return document.getElementById('trend').data.map(t => [t.x.length, t.y[1] / t.y[0]])"
    assert sweep.execute_script(lines) == [[2, pytest.approx(0.8)]] * 8
    find(sweep, "#history-pages button:last-child").click()
    assert len(sweep.execute_script(lines)) == 4
    assert "9 to 12 of 12" in find(sweep, "#history-pages").text
    assert "2026-11-29 10:16" in find(sweep, "#dates").text


def test_differences_that_are_not_shown_make_no_front(sweep: Any) -> None:
    noise = "for (const row of rows) if (row.distance) row.distance.value = 0.1595 + 1e-8 * row.id; render();"
    sweep.execute_script(noise)
    choose(sweep, "#metric", "distance")
    assert sweep.execute_script("return separates(METRICS.distance)") is False
    assert sweep.execute_script(FRONT) == []
    assert sweep.execute_script(PLOTTED) == [0, 24, 0]


@pytest.fixture
def many(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Open the page of 500 runs; go back to the earlier page afterwards."""
    make_sweep(tmp_path / "sweep")
    yield from opened(browser, lambda folder: copy_perturbed(tmp_path / "sweep", folder, 500), tmp_path / "many")


def test_five_hundred_runs_are_shown_in_pages(many: Any) -> None:
    assert find(many, "#count").text == "500 of 500 runs"
    assert many.execute_script(BARS) == [25, 25, 25]
    assert len(many.execute_script(ROWS)) == 100
    assert len(many.execute_script(POINTS)) == 500
    height = "return document.getElementById('stages').getBoundingClientRect().height"
    assert many.execute_script(height) < 900
    first = many.execute_script(ROWS)
    find(many, "#table-pages button:last-child").click()
    second = many.execute_script(ROWS)
    assert len(second) == 100
    assert not set(first) & set(second)
    assert many.get_log("browser") == []


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    script = accessibility_script()  # skips where it is missing
    for make in (make_sweep, make_loads, make_caches, make_tree):
        page = opened(browser, make, tmp_path / make.__name__)
        found = next(page)
        emulate(found, width, scheme)
        found.execute_script(script)
        assert found.execute_async_script(VIOLATIONS) == []
        next(page, None)
