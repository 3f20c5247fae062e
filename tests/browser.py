"""A real browser for pages: headless Chromium through Playwright; tests that need it are skipped without it.

`SDLORA_BROWSER` names the executable; where it is set, a browser that does not start fails the tests.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.checks import HANG_SECONDS

PHONE = (390, 844)
NAMES = ("chromium", "chromium-browser", "google-chrome")
LOCAL = {"127.0.0.1", "localhost", "::1", None, ""}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; of a module, since Playwright's event loop would be in the way of later tests' own."""
    wanted = os.environ.get("SDLORA_BROWSER")
    program = wanted or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium on PATH; install it, or set SDLORA_BROWSER")
    if not wanted:
        pytest.importorskip("playwright", reason="Playwright is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens an address and returns Playwright's page; each call is a new visitor.

    `open_page(url, size=PHONE, scheme="dark", scripts=False)`. The test fails if a page asks another host for
    anything, breaks its own content security policy, or leaves an error of a script; these requests are
    refused and all are listed in `page.problems`, which a test that provokes one can clear.
    """
    opened: list[tuple[Any, list[str]]] = []

    def visit(
        url: str, *, size: tuple[int, int] = (1280, 900), scheme: str = "light", scripts: bool = True
    ) -> Any:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, java_script_enabled=scripts
        )
        # A guard against waiting forever on a busy machine.
        context.set_default_timeout(HANG_SECONDS * 1000)
        page, problems = context.new_page(), []

        def check(route: Any) -> None:
            if urlsplit(route.request.url).hostname in LOCAL:
                route.continue_()
                return
            problems.append(f"asks for {route.request.url}")
            route.abort()

        def read(message: Any) -> None:
            if message.type == "error" and "Content Security Policy" in message.text:
                problems.append(message.text)

        context.route("**/*", check)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", read)
        page.problems = problems
        opened.append((context, problems))
        page.goto(url)
        return page

    yield visit
    for context, _ in opened:
        context.close()
    assert not [problem for _, problems in opened for problem in problems]


def width_beyond(page: Any) -> int:
    """How many pixels a page is wider than its window: more than 0 scrolls sideways."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))
