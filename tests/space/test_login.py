# SPDX-License-Identifier: Apache-2.0
"""Logging in, in a browser: who has done so pushes in their own name, and nobody pushes in that of the Space."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from optimum_calibprune import pocket
from tests.hub_server import OWNER, STRANGER_TOKEN, TOKEN
from tests.space import large
from tests.space.browsing import A_RUN, SOON, ask_for_little, button, opened, playwright
from tests.space.server import SPACE, Server, serve


pytest.importorskip("authlib", reason="logging in needs gradio[oauth]")
from tests.space.openid import LoginHub


SCOPES = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])["hf_oauth_scopes"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    hub = LoginHub()
    variables = hub.of_a_space(["openid", "profile", *SCOPES])  # as a Space gets them from its README
    with serve(tmp_path_factory.mktemp("space"), variables=variables, hub=hub) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with opened() as browser:
        yield browser


def visit(server: Server, browser: playwright.Browser) -> playwright.Page:
    """A new visitor, with cookies of their own. Who left before the page has asked all that it asks as it loads, would be
    brought back by gradio, which takes that for a broken connection."""
    page, ended = browser.new_context().new_page(), []
    for event in ("requestfinished", "requestfailed"):
        page.on(event, lambda request: ended.append(request.url))
    page.goto(server.url)
    log_in(page).wait_for(timeout=SOON)
    while not any("/queue/data" in url for url in ended):
        page.wait_for_timeout(50)
    return page


def visit_logged_in(server: Server, browser: playwright.Browser) -> playwright.Page:
    page = visit(server, browser)
    log_in(page).click()
    button(page, f"Authorize as {OWNER}").click(timeout=SOON)
    log_out(page).wait_for(timeout=SOON)
    return page


def log_in(page: playwright.Page) -> playwright.Locator:
    return page.locator("#login", has_text="Sign in with Hugging Face")


def log_out(page: playwright.Page) -> playwright.Locator:
    return page.locator("#login", has_text=f"Logout ({OWNER})")


def prune_a_little(page: playwright.Page) -> None:
    ask_for_little(page)
    button(page, "Prune").click()
    page.locator(".cp-bars").wait_for(timeout=A_RUN)


def test_visitors_log_in_push_in_their_own_name_and_log_out(server: Server, browser: playwright.Browser) -> None:
    hub = server.hub
    page = visit_logged_in(server, browser)
    assert page.url.startswith(server.url)
    assert hub.provider.scopes[-1] == ["openid", "profile", "contribute-repos", "jobs"]
    assert hub.provider.codes == {}, "the one code was used"

    stranger = visit(server, browser)  # to whom that login means nothing
    prune_a_little(stranger)
    stranger.locator("#repo textarea").fill("me/of-nobody")
    button(stranger, "Push").click()
    stranger.get_by_text("Log in, or give a token of yours").wait_for(timeout=SOON)
    assert ("model", "me/of-nobody") not in hub.repos

    prune_a_little(page)
    page.locator("#repo textarea").fill("me/pocket-50")
    button(page, "Push").click()
    page.get_by_text("Pushed:").wait_for(timeout=SOON)
    assert "model.safetensors" in hub.files("me/pocket-50")
    pushing = {token for method, path, token in hub.requests if method == "POST" and path.startswith("/api/")}
    assert pushing == {f"Bearer {TOKEN}"}

    log_out(page).click()
    log_in(page).wait_for(timeout=SOON)
    prune_a_little(page)
    page.locator("#repo textarea").fill("me/after-logging-out")
    button(page, "Push").click()
    page.get_by_text("Log in, or give a token of yours").wait_for(timeout=SOON)
    assert ("model", "me/after-logging-out") not in hub.repos


def test_a_visitor_who_has_logged_in_starts_jobs_of_their_own(server: Server, browser: playwright.Browser) -> None:
    server.hub.add_repo("owner/large", {"config.json": large.config().encode()})
    page = visit_logged_in(server, browser)
    page.get_by_role("tab", name="Big models").click()
    page.locator("#big-model input").fill("owner/large")
    page.locator("#big-repo textarea").fill("me/large-50")
    button(page, "Estimate").click()
    page.get_by_text("billion parameters").wait_for(timeout=SOON)
    hours = page.get_by_label("number input for Hours")
    hours.fill("24")
    hours.press("Enter")
    page.get_by_text("Ended after 24 hours").wait_for(timeout=SOON)
    button(page, "Start the job").click()
    page.get_by_text("Your login ends before 24 hours are over").wait_for(timeout=SOON)
    hours.fill("3")
    hours.press("Enter")
    button(page, "Start the job").click()
    page.get_by_text("The job is started").wait_for(timeout=SOON)
    [job] = server.hub.jobs.values()
    assert job["owner"]["name"] == OWNER
    assert job["secrets"] == {"HF_TOKEN": TOKEN}


def test_the_token_of_the_space_opens_no_door(server: Server, browser: playwright.Browser) -> None:
    """Neither in the tests before."""
    files = {path.name: path.read_bytes() for path in pocket.MODEL.iterdir() if path.is_file()}
    server.hub.add_repo("owner/tiny", files)
    page = visit(server, browser)
    page.locator("#model input").fill("owner/tiny")
    button(page, "Show the plan").click()
    page.get_by_text("42 linear layers").wait_for(timeout=SOON)
    assert f"Bearer {STRANGER_TOKEN}" not in {token for *_, token in server.hub.requests}
