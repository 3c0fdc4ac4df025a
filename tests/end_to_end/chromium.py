"""A headless browser for tests of pages. Skipped where there is no Chromium with its driver; .ci/run sees to it that
there is.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,900")
MARKS = [pytest.mark.slow, pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver")]


@contextmanager
def headless() -> Iterator[Any]:
    """A browser while it lasts, which remembers what its pages log."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def emulate(driver: Any, width: int, scheme: str) -> None:
    """A window as wide, in the light or the dark scheme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def widths(driver: Any) -> tuple[int, int]:
    """Of what the page holds, and of what is seen of it."""
    whole, inner = (
        driver.execute_script(f"return document.documentElement.{name}Width") for name in ("scroll", "client")
    )
    return whole, inner
