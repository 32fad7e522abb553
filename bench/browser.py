"""Chromium without a window, to look at pages with."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jactus import JactusError

NAMES = ("chromium", "chromium-browser", "google-chrome")  # as Debian, others and its maker call it


def installed() -> str | None:
    """Where it is; None where it is not."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A running one, as playwright drives it. Raises JactusError where there is none."""
    path = installed()
    if path is None:
        raise JactusError("no Chromium is on the path; `apt-get install chromium`, or that of your system")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # The sandbox cannot be had as root in a container; what is opened is our own.
        running = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield running
        finally:
            running.close()
