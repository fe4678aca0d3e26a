"""Pages in a real browser: Debian's Chromium without a screen and without a network."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

LOCAL = ("file:", "data:", "blob:", "about:")


@contextmanager
def opened(page: Path, *, dark: bool = False, width: int = 1200) -> Iterator[Any]:
    """
    A page in headless Chromium; the test is skipped where there is none.

    :param page: the file
    :param dark: whether the reader prefers dark pages
    :param width: of the window, in pixels
    :return: Selenium's driver
    """
    webdriver = pytest.importorskip("selenium.webdriver")
    browser, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver_path):
        pytest.skip("there is no chromium or chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    # As root there is no sandbox; the resolver's rule is the missing network.
    for name in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"):
        options.add_argument(f"--{name}")
    for name in ("disable-background-networking", "disable-component-update", "disable-sync", "disable-quic"):
        options.add_argument(f"--{name}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    options.add_argument(f"--window-size={width},1600")
    if dark:
        options.add_argument("--blink-settings=preferredColorScheme=0")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    try:
        driver.get(page.resolve().as_uri())
        yield driver
    finally:
        driver.quit()


def complaints(driver: Any) -> list[str]:
    """What the browser's console says of warnings and errors; reading empties it."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


def foreign_requests(driver: Any) -> list[str]:
    """Addresses outside the file itself that the page asked for."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith(LOCAL)]
