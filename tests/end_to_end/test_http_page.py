"""The server's page in a browser: generate, watch, reuse, download, cancel, be refused, by mouse and by keyboard."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.resolve.compose import compose_run
from harness.tasks.serve.access import AccessKeys
from tests.fixtures.chromium import MARKS, VIOLATIONS, accessibility_script, emulate, headless, widths
from tests.fixtures.serving.http_server import Live, live

LIMIT_S = 20.0
ELSEWHERE = (
    "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(location.origin))"
)
IMAGES = "[...document.querySelectorAll('#results figure img')]"
LOADED = f"return {IMAGES}.filter(i => i.complete && i.naturalWidth > 0).length"
FIELDS = "[...document.querySelectorAll('#generate :is(input:not([type=checkbox]), select, textarea)')]"
FORM = f"return Object.fromEntries({FIELDS}.map(e => [e.id, e.value]))"
KINDS = "a, button, input, textarea, select"
CONTROLS = f"return [...document.querySelectorAll('{KINDS}')].filter(e => e.checkVisibility())"
OUTSIDE = f"""{CONTROLS}.filter(e => {{
    const box = e.getBoundingClientRect();
    return box.width === 0 || box.left < 0 || box.right > document.documentElement.clientWidth;
}}).map(e => e.outerHTML)"""
WATCH = "window.reached = new Set(); addEventListener('focusin', event => reached.add(event.target))"
REACHED = f"return [...reached].filter(e => e.matches('{KINDS}')).length"
FOCUS = "return document.activeElement.ariaLabel ?? document.activeElement.id"
PREVIEW = "return document.querySelector('#queue .preview:not([hidden])')?.naturalWidth"
TAB, ENTER = "\ue004", "\ue007"

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
    """Wait until a condition holds; the page rebuilds itself, so an element may disappear between two calls."""
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


def actions(page: Any) -> Any:
    """Return a chain of actions of the mouse and the keyboard."""
    return pytest.importorskip("selenium.webdriver.common.action_chains").ActionChains(page)


def fill(page: Any, **given: str) -> None:
    for name, value in given.items():
        found = find(page, f"#{name}")
        found.clear()
        found.send_keys(value)


def submit(page: Any, **given: str) -> None:
    fill(page, **given)
    find(page, "#generate button").click()


def generate(page: Any, **given: str) -> None:
    """Submit the form and wait for the images."""
    before = page.execute_script(LOADED)
    submit(page, **given)
    wanted = before + int(find(page, "#n").get_attribute("value"))
    until(lambda: bool(page.execute_script(LOADED) == wanted), "the images")


def download(page: Any, folder: Path, selector: str) -> Path:
    """Click a link and return the file that the browser saves."""
    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    find(page, selector).click()
    until(lambda: [path.suffix for path in folder.iterdir()] == [".png"], "the file")
    return next(folder.iterdir())


def test_an_image_is_requested_watched_and_shown(page: Any, site: Live) -> None:
    seen: dict[str, None] = {}
    before = page.execute_script(LOADED)
    submit(page, prompt="<b>red</b> apple", negative_prompt="blue", steps="8", seed="7", guidance="2", n="2")

    def shown() -> bool:
        seen.update(dict.fromkeys(texts(page, "#queue .stage")))
        return bool(page.execute_script(LOADED) == before + 2)

    until(shown, "two images")
    steps = [text.partition(" · ") for text in seen if text.startswith("step ")]
    times = [float(elapsed.removesuffix(" s")) for _, _, elapsed in steps]
    assert len({step for step, _, _ in steps}) >= 3, seen
    assert times == sorted(times)
    assert times[-1] > times[0]
    assert texts(page, "#results li:first-child .prompt") == ["<b>red</b> apple"]
    (settings,) = texts(page, "#results li:first-child .settings")
    assert settings.startswith("seed 7 to 8 · euler, 8 steps · guidance 2 · 64x64 · ")
    assert float(settings.rpartition(" · ")[2].removesuffix(" s")) >= times[-1]
    assert find(page, "#news").get_attribute("textContent").startswith("Done in ")
    sent = site.engine.generated[-1]
    assert (sent.negative_prompt, sent.seed, sent.steps, sent.guidance, sent.batch_size) == ("blue", 7, 8, 2.0, 2)
    assert page.find_elements("css selector", "main b") == []
    assert page.get_log("browser") == []
    assert page.execute_script(ELSEWHERE) == []


def test_an_image_fills_the_form_with_its_settings(page: Any, site: Live) -> None:
    wanted = {"prompt": "a fox", "negative_prompt": "rain", "steps": "3", "guidance": "1.5", "size": "64x32"}
    generate(page, **wanted, seed="11", n="2")
    first = site.engine.generated[-1]
    generate(page, prompt="another", negative_prompt="", steps="1", guidance="4", size="64x64", seed="", n="1")
    find(page, "#results li:nth-child(2) figure:nth-child(2) img").click()
    assert page.execute_script(FORM) == {**wanted, "seed": "12", "n": "1", "frames": "1", "solver": "euler"}
    assert page.execute_script(FOCUS) == "prompt"
    find(page, "#results li:nth-child(1) .samples button").send_keys(ENTER)
    form = page.execute_script(FORM)
    seed = str(site.engine.generated[-1].seed)
    assert (form["prompt"], form["negative_prompt"], form["seed"]) == ("another", "", seed)
    find(page, "#results li:nth-child(2) figure:nth-child(1) button").click()
    generate(page)
    again = site.engine.generated[-1]
    assert (again.prompts, again.seed, again.samples_per_prompt) == (first.prompts, 11, 1)
    for name in ("negative_prompt", "steps", "guidance", "height", "width"):
        assert getattr(again, name) == getattr(first, name)


def test_previews_are_seen_while_it_generates(page: Any, site: Live) -> None:
    submit(page, prompt="a fox", steps="20", n="1")
    until(lambda: page.execute_script(PREVIEW) == 8, "a preview")
    assert find(page, "#queue .preview").get_attribute("alt") == "Preview of a fox"
    find(page, "#queue .cancel").click()
    until(lambda: texts(page, "#queue .prompt") == [], "an empty queue")
    find(page, "#previews").click()
    generate(page, prompt="another", steps="2")
    assert [job.request.previews for job in list(site.engine.jobs.values())[-2:]] == [4, 0]


def test_the_solver_goes_with_the_request(page: Any, site: Live) -> None:
    find(page, "#solver option[value=heun]").click()
    generate(page, prompt="a fox", steps="2", seed="1", n="1")
    assert site.engine.generated[-1].solver == "heun"
    assert "heun, 2 steps" in texts(page, "#results li:first-child .settings")[0]
    find(page, "#solver option[value=euler]").click()
    generate(page)
    assert "euler, 2 steps" in texts(page, "#results li:first-child .settings")[0]
    find(page, "#results li:nth-child(2) .samples button").click()
    assert page.execute_script(FORM)["solver"] == "heun"


def test_what_failed_can_be_tried_again(page: Any) -> None:
    submit(page, prompt="oom", steps="2", seed="5", n="3")
    until(lambda: texts(page, "#results li:first-child .error") == ["rank 1: planted"], "the fault")
    fill(page, prompt="x", seed="6", n="1")
    find(page, "#results li:first-child > .actions .reuse").click()
    form = page.execute_script(FORM)
    assert (form["prompt"], form["seed"], form["n"]) == ("oom", "5", "3")


def test_an_image_is_saved_under_a_telling_name(page: Any, tmp_path: Path) -> None:
    generate(page, prompt="Red apple!", steps="2", seed="7", n="2")
    saved = download(page, tmp_path, "#results li:first-child figure:nth-child(2) a")
    assert saved.name == "red-apple-seed8-steps2.png"
    assert saved.read_bytes().startswith(b"\x89PNG")


def test_the_queue_is_seen_and_cancelled(page: Any) -> None:
    for prompt in ("one", "two", "three"):
        submit(page, prompt=prompt, steps="40", n="1")
    until(lambda: texts(page, "#queue .prompt") == ["one", "two", "three"], "the queue in its order")
    until(lambda: "1 running, 2 queued" in find(page, "#state").text, "the counts")
    find(page, "#queue li:nth-child(2) .cancel").click()
    find(page, "#queue li:nth-child(1) .cancel").click()
    until(lambda: texts(page, "#queue .prompt") == ["three"], "what is left")
    until(lambda: texts(page, "#queue .stage")[0].startswith("step "), "the third is generated")
    find(page, "#queue li .cancel").click()
    until(lambda: texts(page, "#queue .prompt") == [], "an empty queue")
    assert texts(page, "#results li:nth-child(-n+3) .error") == ["the request was cancelled"] * 3


def test_the_focus_stays_with_a_request_that_moves(page: Any) -> None:
    for prompt in ("one", "two"):
        submit(page, prompt=prompt, steps="20", n="1")
    until(lambda: texts(page, "#queue .prompt") == ["one", "two"], "the queue")
    find(page, "#queue li:nth-child(1) .cancel").send_keys(ENTER)
    until(lambda: texts(page, "#queue .prompt") == ["two"], "what is left")
    assert page.execute_script(FOCUS) == "queue-title"
    page.switch_to.active_element.send_keys(TAB)
    assert page.execute_script(FOCUS) == "Cancel: two"
    page.switch_to.active_element.send_keys(ENTER)
    until(lambda: texts(page, "#queue .prompt") == [], "an empty queue")


def test_refusals_and_faults_are_reported(page: Any, site: Live) -> None:
    submit(page, prompt="x", size="65x64")
    until(lambda: "64 or 72" in find(page, "#form-error").text, "the refusal")
    submit(page, prompt="oom", size="64x64", steps="1")
    until(lambda: texts(page, "#results li:first-child .error") == ["rank 1: planted"], "the fault")
    assert find(page, "#form-error").text == ""
    site.engine.state, site.engine.reason = "restarting", "rank 1 died with SIGKILL"
    until(lambda: find(page, "#state").text == "restarting: rank 1 died with SIGKILL", "the state")
    site.engine.state = "ready"


def test_a_server_that_is_away_is_said_and_found_again(page: Any) -> None:
    fill(page, prompt="kept", steps="3")
    page.execute_cdp_cmd("Network.enable", {})
    page.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/v1/*"]})
    try:
        find(page, "#generate button").click()
        until(lambda: find(page, "#form-error").text == "the server does not answer", "the refusal")
        until(lambda: find(page, "#state").text == "failed: the server does not answer", "the state")
        page.refresh()
        until(lambda: find(page, "#state").text == "failed: the server does not answer", "the state at the start")
    finally:
        page.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    until(lambda: find(page, "#state").text == "ready", "the state")
    assert find(page, "#steps").get_attribute("value") == "20"
    page.get_log("browser")  # the failures


def test_the_page_asks_for_a_key_and_shows_what_it_opens(browser: Any, tmp_path: Path) -> None:
    config = compose_run(["task=serve", "serve.port=0"]).config
    (tmp_path / "saved").mkdir()
    with live(config, tmp_path, step_s=0.1, keys=AccessKeys({"of-ann": "ann"})) as guarded:
        browser.get(guarded.url)
        until(lambda: find(browser, "#key").is_displayed(), "the question")
        assert not find(browser, "#generate").is_displayed()
        assert browser.execute_script(FOCUS) == "key"
        for key in ("wrong", "of-ann"):
            find(browser, "#key").send_keys(key)
            find(browser, "#access button").click()
            if key == "wrong":
                until(lambda: "not one of" in find(browser, "#key-error").text, "the refusal")
        until(lambda: find(browser, "#generate").is_displayed(), "the form")
        submit(browser, prompt="赤い apple", steps="20", seed="7")
        until(lambda: browser.execute_script(PREVIEW) == 8, "a preview")
        until(lambda: browser.execute_script(LOADED) == 1, "the image")
        assert browser.execute_script(f"return {IMAGES}[0].src").startswith("blob:")
        assert download(browser, tmp_path / "saved", "#results a").name == "赤い-apple-seed7-steps20.png"
        assert not find(browser, "#access").is_displayed()
        stored = "return JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
        assert "of-ann" not in browser.execute_script(stored)
        guarded.engine.state, guarded.engine.reason = "failed", "rank 1 died"
        until(lambda: find(browser, "#state").text == "failed: rank 1 died", "the state")
    browser.get_log("browser")  # the refusals


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_fits_and_can_be_reached(page: Any, width: int, scheme: str) -> None:
    emulate(page, width, scheme)
    for n in ("1", "4", "8"):
        generate(page, prompt="nobreak" * 60, steps="1", n=n)
    submit(page, steps="200", n="1")
    until(lambda: texts(page, "#queue .stage") != [] and texts(page, "#queue .stage")[0].startswith("step "), "a step")
    whole, inner = widths(page)
    assert whole <= inner <= width
    assert page.execute_script(OUTSIDE) == []
    page.execute_script(WATCH)
    wanted = len(page.execute_script(CONTROLS))
    actions(page).send_keys(TAB * (wanted + 1)).perform()  # one more: the page itself may be the first stop
    until(lambda: page.execute_script(REACHED) == wanted, "every control by the keyboard")
    ink = page.execute_script("return getComputedStyle(document.body).color")
    assert ink == ("rgb(228, 231, 234)" if scheme == "dark" else "rgb(29, 33, 37)")
    find(page, "#queue .cancel").click()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Any, width: int, scheme: str) -> None:
    script = accessibility_script()
    emulate(page, width, scheme)
    generate(page, prompt="x", steps="1", n="2")
    submit(page, prompt="oom", n="1")
    until(lambda: texts(page, "#results li:first-child .error") == ["rank 1: planted"], "the fault")
    submit(page, prompt="x", steps="200")
    submit(page, size="65x64")
    until(lambda: "64 or 72" in find(page, "#form-error").text, "the refusal")
    until(lambda: texts(page, "#queue .stage")[0].startswith("step "), "a step")
    page.execute_script(script)
    assert page.execute_async_script(VIOLATIONS) == []
    find(page, "#queue .cancel").click()
    page.get(f"{page.current_url}docs")
    page.execute_script(script)
    assert page.execute_async_script(VIOLATIONS) == []
    whole, inner = widths(page)
    assert whole <= inner <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_the_question_for_a_key(browser: Any, tmp_path: Path, scheme: str) -> None:
    script, config = accessibility_script(), compose_run(["task=serve", "serve.port=0"]).config
    emulate(browser, 390, scheme)
    with live(config, tmp_path, keys=AccessKeys({"of-ann": "ann"})) as guarded:
        browser.get(guarded.url)
        find(browser, "#key").send_keys("wrong")
        find(browser, "#access button").click()
        until(lambda: "not one of" in find(browser, "#key-error").text, "the refusal")
        browser.execute_script(script)
        assert browser.execute_async_script(VIOLATIONS) == []
    browser.get_log("browser")  # the refusals
