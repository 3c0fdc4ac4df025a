"""The page of task=report in a browser: what a reader types and clicks changes the table, the charts and the front."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.cli import dispatch
from tests.fixtures.chromium import MARKS, emulate, headless, widths
from tests.fixtures.report_tree import HOSTILE, make_caches, make_loads, make_tree

BARS = "return document.getElementById('stages').data.map(t => t.x.length)"
FRONT = "return [...document.querySelectorAll('#front li')].map(e => e.textContent.split(': ')[0])"
PLOTTED = (
    "return document.getElementById('pareto').data.filter(t => t.mode === 'markers').map(t => [t.name, t.x.length])"
)
ROWS = "return [...document.querySelectorAll('#table tbody td.folder')].map(e => e.textContent)"
FETCHED = "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))"
FITTED = (
    "return [...document.querySelectorAll('.chart:has(.main-svg)')].every(c => c._fullLayout.width === c.clientWidth)"
)
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


def test_it_opens_with_every_run_and_fetches_nothing(fresh: Any) -> None:
    assert len(fresh.execute_script(ROWS)) == 15
    assert find(fresh, "#count").text == "15 of 15 runs"
    assert fresh.execute_script(BARS) == [11, 11, 11]
    assert fresh.execute_script(PLOTTED) == [["on the Pareto front", 4], ["dominated", 1], ["failed", 1]]
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
    find(fresh, "#words").send_keys("steps=8 HEUN")
    assert fresh.execute_script(ROWS) == ["heun8"]
    assert fresh.execute_script(BARS) == [1, 1, 1]
    assert fresh.execute_script(FRONT) == ["heun steps=8"]
    find(fresh, "#words").send_keys(" nothing")
    assert fresh.execute_script(ROWS) == []
    assert "No run shown" in find(fresh, "#stages").text
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
    fronts = {}
    for metric in ("rel_l2", "psnr_db", "distance", "top1"):
        find(fresh, f"[name=metric][value={metric}]").click()
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
    assert "No run shown has a cache" in find(caches, "#baselines").text
    assert caches.get_log("browser") == []
