"""The page of the server as axe-core sees it: names, contrast and structure, with an image on it."""

from collections.abc import Iterator
from typing import Any

import pytest

from harness.resolve.compose import compose_run
from tests.fixtures.chromium import MARKS, VIOLATIONS, accessibility_script, emulate, headless
from tests.fixtures.serving.http_server import live

pytestmark = MARKS


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Open the server's page once an image is there."""
    script = accessibility_script()
    config = compose_run(["task=serve", "serve.port=0"]).config
    with live(config, tmp_path_factory.mktemp("site"), step_s=0.01) as site, headless() as browser:
        waiting = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait(browser, 20)
        browser.get(site.url)
        waiting.until(lambda found: "ready" in found.find_element("css selector", "#state").text)
        browser.find_element("css selector", "#prompt").send_keys("rocket")
        browser.find_element("css selector", "#generate button[type=submit]").click()
        waiting.until(lambda found: found.find_elements("css selector", "#results img"))
        browser.execute_script(script)
        yield browser


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_the_server_s_page(page: Any, width: int, scheme: str) -> None:
    emulate(page, width, scheme)
    assert page.execute_async_script(VIOLATIONS) == []
