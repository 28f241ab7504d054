# SPDX-License-Identifier: Apache-2.0
"""A browser for the tests of the page. Modules that import this are skipped where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


pytest.importorskip("gradio", reason="the Space needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("the browser tests need Chromium: apt-get install chromium", allow_module_level=True)

A_RUN = 400_000  # milliseconds
SOON = 60_000
ALONE = (
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # gradio's pages ask for fonts, and on a Space for more
)


@contextmanager
def opened() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", ALONE])
        yield browser
        browser.close()


def button(page: playwright.Page, name: str) -> playwright.Locator:
    return page.get_by_role("button", name=name, exact=True)


def unfold(page: playwright.Page, name: str) -> None:
    page.get_by_role("button", name=name).click()  # its name ends with an arrow


def ask_for_little(page: playwright.Page) -> None:
    """Only one capability is measured."""
    unfold(page, "More settings")
    for name in ("commonsense", "code", "math"):
        page.get_by_label(name, exact=True).uncheck()
