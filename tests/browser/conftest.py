"""A headless Chromium: the system's, or the one that playwright downloads."""
import shutil

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW = ("no Chromium was found: install one with the system's packages (Debian, Ubuntu: apt-get "
       "install chromium) or with .venv/bin/playwright install --with-deps chromium")


@pytest.fixture(scope="session")
def browser():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        try:
            # The sandbox cannot start as root, as in most containers; only our pages are opened.
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as problem:
            pytest.exit(f"{HOW} ({str(problem).splitlines()[0]})", returncode=1)
        yield browser
        browser.close()


class Watched:
    """A page, what its console said, and what it asked for beside `own`."""

    def __init__(self, browser: Browser, own: str, width: int):
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.set_default_timeout(20_000)
        self.problems, self.foreign = [], []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.note(request.url, own))

    def note(self, url: str, own: str) -> None:
        if not url.startswith((own, "data:", "blob:")):
            self.foreign.append(url)

    def assert_clean(self) -> None:
        assert not self.problems and not self.foreign


@pytest.fixture
def open_page(browser):
    """open_page(address, width) -> Watched. At the end of a test its pages close."""
    watched = []

    def open_at(address: str, width: int = 1000) -> Watched:
        watched.append(Watched(browser, address, width))
        watched[-1].page.goto(address)
        return watched[-1]
    yield open_at
    for each in watched:
        each.page.close()


def fits(page: Page) -> bool:
    """Whether nothing of the page is beyond its right edge."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
