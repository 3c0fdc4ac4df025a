"""The server's page in a browser: send a request, watch its steps, see the image, cancel, be refused."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.resolve.compose import compose_run
from harness.tasks.serve.access import AccessKeys
from tests.fixtures.chromium import MARKS, emulate, headless, widths
from tests.fixtures.serving.http_server import Live, live

LIMIT_S = 20.0
ELSEWHERE = (
    "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(location.origin))"
)
LOADED = "return [...document.querySelectorAll('#results img')].filter(i => i.complete && i.naturalWidth > 0).length"

pytestmark = MARKS


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    config = compose_run(["task=serve", "serve.port=0"]).config
    with live(config, tmp_path_factory.mktemp("site"), step_s=0.2) as found:
        yield found


@pytest.fixture(scope="module")
def browser(site: Live) -> Iterator[Any]:
    with headless() as driver:
        yield driver


@pytest.fixture
def page(browser: Any, site: Live) -> Any:
    """Return the page as it opens."""
    browser.get(site.url)
    until(lambda: "ready" in find(browser, "#state").text, "the state")
    return browser


def find(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def texts(page: Any, selector: str) -> list[str]:
    return [found.text for found in page.find_elements("css selector", selector)]


def until(condition: Callable[[], bool], what: str) -> None:
    """Return whether an element is visible; the page rebuilds itself, so an element may disappear between two calls."""
    stale = pytest.importorskip("selenium.common.exceptions").WebDriverException
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except stale:
            pass
        time.sleep(0.02)
    pytest.fail(f"waited {LIMIT_S} s for {what}")


def submit(page: Any, **given: str) -> None:
    for name, value in given.items():
        found = find(page, f"#{name}")
        found.clear()
        found.send_keys(value)
    find(page, "#generate button").click()


def test_an_image_is_requested_watched_and_shown(page: Any, site: Live) -> None:
    before = page.execute_script(LOADED)
    seen: set[str] = set()
    submit(page, prompt="<b>red</b> apple", negative_prompt="blue", steps="8", seed="7", guidance="2", n="2")

    def shown() -> bool:
        seen.update(texts(page, "#queue .stage"))
        return bool(page.execute_script(LOADED) == before + 2)

    until(shown, "two pictures")
    assert len({where for where in seen if where.startswith("step ")}) >= 3, seen
    assert texts(page, "#results li:first-child .prompt") == ["<b>red</b> apple"]
    assert texts(page, "#results li:first-child .settings") == ["seed 7 to 8 · 8 steps · guidance 2 · 64x64"]
    sent = site.engine.generated[-1]
    assert (sent.negative_prompt, sent.seed, sent.steps, sent.guidance, sent.batch_size) == ("blue", 7, 8, 2.0, 2)
    assert page.find_elements("css selector", "main b") == []
    assert page.get_log("browser") == []
    assert page.execute_script(ELSEWHERE) == []


def test_the_queue_is_seen_and_cancelled(page: Any) -> None:
    for prompt in ("one", "two", "three"):
        submit(page, prompt=prompt, steps="40")
    until(lambda: texts(page, "#queue .prompt") == ["one", "two", "three"], "the queue in its order")
    until(lambda: "1 running, 2 queued" in find(page, "#state").text, "the counts")
    find(page, "#queue li:nth-child(2) button").click()
    find(page, "#queue li:nth-child(1) button").click()
    until(lambda: texts(page, "#queue .prompt") == ["three"], "what is left")
    until(lambda: texts(page, "#queue .stage")[0].startswith("step "), "the third is drawn")
    find(page, "#queue li button").click()
    until(lambda: texts(page, "#queue .prompt") == [], "an empty queue")
    assert texts(page, "#results li:nth-child(-n+3) .error") == ["the request was cancelled"] * 3


def test_refusals_and_faults_are_reported(page: Any, site: Live) -> None:
    submit(page, prompt="x", size="65x64")
    until(lambda: "64 or 72" in find(page, "#form-error").text, "the refusal")
    submit(page, prompt="oom", size="64x64", steps="1")
    until(lambda: texts(page, "#results li:first-child .error") == ["rank 1: planted"], "the fault")
    assert find(page, "#form-error").text == ""
    site.engine.state, site.engine.reason = "restarting", "rank 1 died with SIGKILL"
    until(lambda: find(page, "#state").text == "restarting: rank 1 died with SIGKILL", "the state")
    site.engine.state = "ready"


def test_the_page_asks_for_a_key_and_shows_what_it_opens(browser: Any, tmp_path: Path) -> None:
    config = compose_run(["task=serve", "serve.port=0"]).config
    with live(config, tmp_path, keys=AccessKeys({"of-ann": "ann"})) as guarded:
        browser.get(guarded.url)
        until(lambda: find(browser, "#key").is_displayed(), "the question")
        assert not find(browser, "#generate").is_displayed()
        for key in ("wrong", "of-ann"):
            find(browser, "#key").send_keys(key)
            find(browser, "#access button").click()
            if key == "wrong":
                until(lambda: "not one of" in find(browser, "#key-error").text, "the refusal")
        until(lambda: find(browser, "#generate").is_displayed(), "the form")
        submit(browser, prompt="x", steps="2")
        until(lambda: browser.execute_script(LOADED) == 1, "the image")
        assert browser.execute_script("return document.querySelector('#results img').src").startswith("blob:")
        assert not find(browser, "#access").is_displayed()
        stored = "return JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
        assert "of-ann" not in browser.execute_script(stored)
        guarded.engine.state, guarded.engine.reason = "failed", "rank 1 died"
        until(lambda: find(browser, "#state").text == "failed: rank 1 died", "the state")
    browser.get_log("browser")  # the refusals


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows(page: Any, width: int, scheme: str) -> None:
    emulate(page, width, scheme)
    submit(page, prompt="nobreak" * 60, steps="1", n="8")
    until(lambda: texts(page, "#results li:first-child .prompt")[0].startswith("nobreak"), "the answer")
    whole, inner = widths(page)
    assert whole <= inner <= width
    ink = page.execute_script("return getComputedStyle(document.body).color")
    assert ink == ("rgb(228, 231, 234)" if scheme == "dark" else "rgb(29, 33, 37)")
