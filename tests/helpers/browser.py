"""Headless Chromium: for tests, and for pictures of a page.

python -m tests.helpers.browser runs/demo/report.html docs/report.png
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
MISSING = "there is no Chromium: apt-get install chromium"
WIDTH, HEIGHT = 1100, 690  # pixels of the window


def program() -> str | None:
    """Path of an installed Chromium."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, which ends with the `with` block."""
    alone = ["--no-sandbox"] if os.geteuid() == 0 else []  # as root Chromium refuses to start with its sandbox
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program(), args=[*alone, "--disable-gpu"])
        yield browser
        browser.close()


class Shown:
    """A page in a window of its own, and all that it complains about or asks for.

    Attributes:
        path: of the page.
        complaints: errors and warnings of the console, exceptions, dialogs.
        requests: addresses, the page's own first.
    """

    def __init__(self, browser: Browser, path: Path, *, dark: bool = False, width: int = WIDTH) -> None:
        self.path = path
        self.complaints: list[str] = []
        self.requests: list[str] = []
        scheme: Any = "dark" if dark else "light"
        self.page: Page = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type in LOUD else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.goto(path.resolve().as_uri())

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """Save a screenshot: of the whole page, or of what the window shows."""
        self.page.screenshot(path=path, full_page=whole)


LOUD = ("error", "warning")


def main(words: Sequence[str]) -> None:
    page, picture = map(Path, words)
    with chromium() as browser:
        Shown(browser, page).picture(picture, whole=False)


if __name__ == "__main__":
    main(sys.argv[1:])
