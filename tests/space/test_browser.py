# SPDX-License-Identifier: Apache-2.0
"""The Space in a browser: the newcomer's path, and what can go wrong on it. Screenshots go to runs/space/."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from optimum_calibprune import pocket
from tests.hub_server import TOKEN
from tests.space import large
from tests.space.browsing import A_RUN, SOON, ask_for_little, button, opened, playwright, unfold
from tests.space.server import Server, serve


LEAVING = (  # what Gradio says as its page goes and ends its streams; the last in Chromium 156
    "BodyStreamBuffer was aborted",
    "Connection errored out",
    "signal is aborted without reason",
)
SCREENSHOTS = Path(__file__).parents[2] / "runs" / "space"
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("space")) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with opened() as browser:
        yield browser


@pytest.fixture
def visit(server: Server, browser: playwright.Browser) -> Iterator[Callable[..., playwright.Page]]:
    """Opens the Space as a new visitor; in the end no console of theirs may have shown an error."""
    errors: list[str] = []
    contexts = []

    def visit(theme: str = "light", viewport: dict = DESK, reloads: bool = False) -> playwright.Page:
        contexts.append(browser.new_context(viewport=viewport))
        page = contexts[-1].new_page()
        allowed = LEAVING if reloads else ()

        def keep(text: str) -> None:
            if not any(part in text for part in allowed):
                errors.append(text)

        page.on("pageerror", lambda error: keep(str(error)))
        page.on("console", lambda said: keep(said.text) if ours(said) else None)
        page.goto(f"{server.url}/?__theme={theme}")
        button(page, "Prune").wait_for(timeout=SOON)
        return page

    def ours(said: playwright.ConsoleMessage) -> bool:
        return said.type == "error" and said.location["url"].startswith(server.url)

    yield visit
    for context in contexts:
        context.close()
    assert errors == []


def choose_sparsity(page: playwright.Page, sparsity: str) -> None:
    page.locator("[id$=sparsity] input:visible").click()
    page.get_by_role("option", name=sparsity).click()


def model_files() -> dict[str, bytes]:
    """Of a model on the Hub that is the pocket in all but its name."""
    files = {path.name: path.read_bytes() for path in pocket.MODEL.iterdir() if path.is_file()}
    return files | {"README.md": b"---\npipeline_tag: text-generation\nlibrary_name: transformers\n---\n"}


def turn_to(page: playwright.Page, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()


def shoot_all(page: playwright.Page, name: str) -> None:
    """Light and dark, on a desk and on a phone, where nothing may stick out."""
    for where, viewport in (("", DESK), ("-phone", PHONE)):
        page.set_viewport_size(viewport)
        for theme in ("light", "dark"):
            set_theme(page, theme)
            shoot(page, f"{name}-{theme}{where}")
        assert fits(page)
    page.set_viewport_size(DESK)
    set_theme(page, "light")


def shoot(page: playwright.Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(500)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def set_theme(page: playwright.Page, theme: str) -> None:
    page.evaluate("theme => document.body.classList.toggle('dark', theme === 'dark')", theme)


def fits(page: playwright.Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_newcomers_path_leads_to_the_figure_and_to_the_hub(server: Server, visit: Callable) -> None:
    page = visit()
    shoot_all(page, "form")
    page.keyboard.press("Tab")
    button(page, "Prune").focus()
    page.keyboard.press("Enter")  # one key, no mouse
    page.locator(".cp-now").wait_for(timeout=SOON)
    page.get_by_text("42 linear layers").wait_for(timeout=SOON)
    shoot(page, "progress-light")
    page.locator(".cp-bars").wait_for(timeout=A_RUN)
    assert page.locator(".cp-row[role=img]").count() == 5  # four capabilities and the total
    kept = [
        text.rstrip(" %") for text in re.findall(r"[\d.]+ %", " ".join(page.locator(".cp-number").all_inner_texts()))
    ]
    assert len(kept) == 5
    assert all(0 <= float(share) <= 150 for share in kept)
    assert float(kept[-1]) == pytest.approx(sum(map(float, kept[:-1])) / 4, abs=0.1)
    assert page.locator(".cp-interval").count() == 5
    assert page.locator(".cp-heat td").count() == 42
    shoot_all(page, "result")

    unfold(page, "Model card")
    page.get_by_role("heading", name="pocket at 50%").wait_for(timeout=SOON)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").or_(button(page, "Download the pruned model")).first.click()
    assert download.value.suggested_filename == "pocket-50.zip"

    page.locator("#repo textarea").fill("me/pocket-50")
    button(page, "Push").click()
    page.get_by_text("Log in, or give a token").wait_for(timeout=SOON)
    page.locator("#token input").fill(TOKEN)
    button(page, "Push").click()
    page.get_by_text("Pushed:").wait_for(timeout=SOON)
    assert "model.safetensors" in server.hub.files("me/pocket-50")

    turn_to(page, "Compare mixes")
    page.locator(".cp-runs li").wait_for(timeout=SOON)
    assert f"{kept[-1]} % kept" in page.locator(".cp-runs li").inner_text()  # what was pruned is there already
    turn_to(page, "Try it")
    page.get_by_text("pocket: dense, and at 50% sparsity.").wait_for(timeout=SOON)
    button(page, "Answer").focus()
    page.keyboard.press("Enter")
    page.get_by_text("Done.", exact=True).wait_for(timeout=SOON)
    dense, sparse = page.locator(".cp-answer").all_inner_texts()
    assert dense.strip().startswith("Ottawa")
    assert sparse
    shoot_all(page, "try")
    bad = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    page.locator("#prompt textarea").fill(f"Question: What is {bad}?\nAnswer: {bad}\n" * 9)
    button(page, "Answer").click()
    page.get_by_text("Done.", exact=True).wait_for(state="detached", timeout=SOON)
    page.get_by_text("Done.", exact=True).wait_for(timeout=SOON)
    assert page.locator(".cp-answer img, .cp-answer script").count() == 0

    turn_to(page, "Prune")  # once more: nothing of the first result stays beside the second
    choose_sparsity(page, "70%")
    ask_for_little(page)
    button(page, "Prune").click()
    page.locator(".cp-headline", has_text="at 70% sparsity").wait_for(timeout=A_RUN)
    assert page.get_by_text("Pushed:").count() == 0
    turn_to(page, "Try it")
    page.get_by_text("pocket: dense, and at 70% sparsity.").wait_for(timeout=SOON)
    assert page.locator(".cp-answer").count() == 0


@pytest.mark.parametrize("name", ["no such model", "../../etc", "<img src=x onerror=alert(1)>"])
def test_a_bad_name_is_answered_in_one_sentence(visit: Callable, name: str) -> None:
    page = visit()
    page.locator("#model input").fill(name)
    button(page, "Prune").click()
    said = page.locator(".cp-error")
    said.wait_for(timeout=SOON)
    assert (
        said.inner_text() == f"{name!r} is no name of a model on the Hub; write one such as 'owner/name', or 'pocket'."
    )
    playwright.expect(button(page, "Prune")).to_be_enabled()
    playwright.expect(button(page, "Stop")).to_be_hidden()


def wait_for_choices(page: playwright.Page, *names: str) -> None:
    listed = "[...document.querySelectorAll('[role=option]')].map(entry => entry.ariaLabel).join()"
    page.wait_for_function(f"names => {listed} === names", arg=",".join(names), timeout=SOON)


def test_models_of_the_hub_are_found_by_a_part_of_their_name(server: Server, visit: Callable) -> None:
    for name in ("owner/other", "owner/tiny-story"):
        server.hub.add_repo(name, model_files())
    page = visit()
    field = page.locator("#model input")
    field.focus()
    page.keyboard.type("own")
    wait_for_choices(page, "pocket", "owner/other", "owner/tiny-story")
    page.keyboard.type("er/t")
    wait_for_choices(page, "pocket", "owner/tiny-story")  # the list, while it was open, lost all before its last
    shoot(page, "search-light")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    playwright.expect(field).to_have_value("owner/tiny-story")
    page.locator("#mix input").click()
    page.get_by_role("option", name="c4: general alone").wait_for(timeout=SOON)  # a source for models of the Hub
    page.get_by_role("option", name="self-cal").click()
    button(page, "Show the plan").click()
    page.get_by_text("42 linear layers").wait_for(timeout=SOON)
    assert page.locator("code", has_text="self-cal").is_visible()

    server.hub.fail_next("GET", "/api/models", 500, times=9)
    field.focus()
    page.keyboard.type("owner/other")
    page.keyboard.press("Tab")
    playwright.expect(page.get_by_label("Sparsity").first).to_be_focused()
    page.wait_for_timeout(1000)  # in which a search would have opened its list again
    assert page.locator("#model [role=option]:visible").count() == 0
    playwright.expect(field).to_have_value("owner/other")
    server.hub.forget_faults()
    field.fill("x" * 2**20)
    page.keyboard.press("x")
    turn_to(page, "Compare mixes")
    page.locator("#compare-model input").focus()
    page.keyboard.type("oth")
    page.get_by_role("option", name="owner/other").click()
    mixes = page.locator("#mixes")
    playwright.expect(mixes).not_to_contain_text("thealgorithms")  # a source for the pocket alone
    playwright.expect(mixes).to_contain_text("gsm8k: math alone")
    turn_to(page, "Big models")
    page.locator("#big-model input").focus()
    page.keyboard.type("oth")
    page.get_by_role("option", name="owner/other").click()
    button(page, "Show the command").click()
    page.get_by_text("prune owner/other").wait_for(timeout=SOON)
    assert {token for _, target, token in server.hub.requests if target.startswith("/api/models?")} == {None}


def test_stop_stops(server: Server, visit: Callable) -> None:
    page = visit()
    button(page, "Prune").click()
    page.get_by_text("42 linear layers").wait_for(timeout=SOON)
    assert server.visitors
    button(page, "Stop").click()
    page.get_by_text("of what it had not finished, nothing is left").wait_for(timeout=SOON)
    server.wait_for_no_visitors(5)
    assert page.locator(".cp-bars").count() == 0
    button(page, "Show the plan").click()  # the queue is free again
    page.get_by_text("press Prune to go on").wait_for(timeout=SOON)
    page.get_by_text("42 linear layers").wait_for(timeout=SOON)


def test_a_reload_ends_the_run_and_the_page_works_again(server: Server, visit: Callable) -> None:
    page = visit(reloads=True)
    button(page, "Prune").click()
    page.get_by_text("42 linear layers").wait_for(timeout=SOON)
    [folder] = server.visitors
    page.reload()
    button(page, "Prune").wait_for(timeout=SOON)
    until = time.monotonic() + 60
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.2)
    assert not folder.exists()
    ask_for_little(page)
    button(page, "Prune").click()
    page.locator(".cp-now").wait_for(timeout=SOON)
    button(page, "Stop").click()
    page.get_by_text("of what it had not finished, nothing is left").wait_for(timeout=SOON)


def test_mixes_are_compared_side_by_side(server: Server, visit: Callable) -> None:
    page, stranger = visit(reloads=True), visit()
    turn_to(page, "Compare mixes")
    button(page, "Compare").click()
    page.get_by_text("Mix 1 of 3: uniform").wait_for(timeout=SOON)
    page.locator(".cp-now").wait_for(timeout=SOON)
    shoot(page, "compare-progress-light")
    page.reload()  # ends it
    server.wait_for_no_visitors()
    turn_to(page, "Compare mixes")
    button(page, "Compare").click()
    page.get_by_text("Mix 2 of 3: thealgorithms").wait_for(timeout=A_RUN)
    turn_to(page, "Prune")  # and back
    turn_to(page, "Compare mixes")
    page.get_by_text("The figure stands below").wait_for(timeout=A_RUN)
    assert page.locator(".cp-group").count() == 5
    assert page.locator(".cp-group .cp-row").count() == 15
    assert page.locator(".cp-runs li").count() == 3
    shoot_all(page, "compare")
    turn_to(stranger, "Compare mixes")
    stranger.get_by_text("Nothing to compare yet").wait_for(timeout=SOON)
    assert stranger.locator(".cp-runs").count() == 0
    shoot(stranger, "compare-empty-light")
    turn_to(stranger, "Try it")
    button(stranger, "Answer").click()
    stranger.get_by_text("There is no result yet").wait_for(timeout=SOON)
    button(page, "Compare").click()
    page.get_by_text("Mix 1 of 3: uniform").wait_for(timeout=SOON)
    button(page, "Stop").click()
    page.get_by_text("of what it had not finished, nothing is left").wait_for(timeout=SOON)
    button(page, "Forget these runs").click()
    page.get_by_text("Nothing to compare yet").wait_for(timeout=SOON)
    server.wait_for_no_visitors()


def test_a_large_model_is_estimated_and_started_elsewhere(server: Server, visit: Callable) -> None:
    server.hub.add_repo("owner/large", {"config.json": large.config().encode()})
    page = visit()
    turn_to(page, "Big models")
    shoot(page, "big-empty-light")
    page.locator("#big-model input").fill("owner/large")
    page.keyboard.press("Tab")
    button(page, "Show the command").click()
    page.get_by_text("calibprune prune owner/large").wait_for(timeout=SOON)
    button(page, "Estimate").click()
    page.get_by_text("8.0 billion parameters").wait_for(timeout=SOON)
    assert page.locator(".cp-estimate tr").count() == 1 + 3
    page.get_by_text("at most $").wait_for(timeout=SOON)
    button(page, "Start the job").click()
    page.get_by_text("Log in, or give a token").wait_for(timeout=SOON)
    page.locator("#big-token input").fill(TOKEN)
    button(page, "Start the job").click()
    page.get_by_text("Name a repo to push to").wait_for(timeout=SOON)
    page.locator("#big-repo textarea").fill("me/large-50")
    button(page, "Start the job").click()
    page.get_by_text("The job is started").wait_for(timeout=SOON)
    playwright.expect(button(page, "Start the job")).to_be_disabled()  # a second click would be a second job
    [job] = server.hub.jobs.values()
    assert job["secrets"] == {"HF_TOKEN": TOKEN}
    button(page, "How is it going?").click()
    page.get_by_text("State of the job: scheduling").wait_for(timeout=SOON)
    shoot_all(page, "big")
    button(page, "Cancel the job").click()
    page.get_by_text("The job is cancelled").wait_for(timeout=SOON)
    assert job["status"]["stage"] == "CANCELED"
    page.locator("#big-repo textarea").fill("no such repo")
    button(page, "Start the job").click()
    page.get_by_text("is no name of a repo").wait_for(timeout=SOON)
    button(page, "How is it going?").click()
    page.get_by_text("State of the job: canceled").wait_for(timeout=SOON)
    page.locator("#big-sparsity input").click()
    page.get_by_role("option", name="2:4").click()
    page.get_by_text("What it takes stands here").wait_for(timeout=SOON)  # another run, another estimate
    playwright.expect(page.locator("#flavor input")).to_have_value("")


def test_two_visitors_at_once_see_their_own_result(visit: Callable) -> None:
    pages = {"30%": visit(), "70%": visit()}
    for sparsity, page in pages.items():
        choose_sparsity(page, sparsity)
        ask_for_little(page)
        button(page, "Prune").click()
    playwright.expect(pages["70%"].get_by_text("Waiting for a turn")).to_be_visible()
    for sparsity, page in pages.items():
        page.locator(".cp-bars").wait_for(timeout=A_RUN)
        assert f"at {sparsity} sparsity" in page.locator(".cp-headline").inner_text()
    stranger = visit()
    assert stranger.locator(".cp-bars").count() == 0


def test_the_form_fits_a_phone_and_has_a_dark_side(visit: Callable) -> None:
    page = visit("dark", PHONE)
    assert fits(page)
    unfold(page, "More settings")
    page.get_by_label("Samples").first.wait_for(timeout=SOON)
    assert fits(page)
