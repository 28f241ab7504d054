# SPDX-License-Identifier: Apache-2.0
"""The page: form -> job -> CalibPruner -> figures. What may be asked stands in limits.py, how it runs in runs.py."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


ROOT = Path(tempfile.gettempdir()) / "calibprune-space"
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ["GRADIO_TEMP_DIR"] = str(ROOT / "files")  # gradio reads both when it is imported

import gradio as gr  # noqa: E402

import figures  # noqa: E402
from limits import CAPABILITIES, KEPT_SECONDS, MIXES, POCKET, SAMPLES, SPARSITIES, WAITING, Job, checked, checked_repo  # noqa: E402
from optimum_calibprune import calibration_sources, push_folder  # noqa: E402
from runs import EXPECTED, STOPPED, Run, Visitors, plan_of, sentence  # noqa: E402


HERE = Path(__file__).parent
EVERY = 0.4  # seconds between two looks at a run
ABOUT = """# CalibPrune
Prune a language model in the browser and see what it forgets: general knowledge, commonsense, code and math are measured before
and after. The bundled **pocket** model is ready; press Prune."""
TURN = {"concurrency_id": "run", "concurrency_limit": 1}
PRIVATE = {"api_visibility": "private"}


def theme() -> gr.themes.Base:
    fonts = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]  # nothing is fetched from elsewhere
    mono = ["ui-monospace", "Menlo", "monospace"]
    return gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=mono)


def build_demo(visitors: Visitors, login: bool = False) -> gr.Blocks:
    """The page and its API. With `login` there is a button that logs in at the Hub, which works on a Space only."""
    with gr.Blocks(title="CalibPrune", delete_cache=(60, KEPT_SECONDS)) as demo:
        _api(visitors)  # before the page's own events, which would take the names
        gr.Markdown(ABOUT, elem_classes="cp-title")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                form, go, look, stop = _form()
            with gr.Column(scale=3, min_width=300):
                plan = gr.Markdown("")
                status = gr.HTML(figures.message("Plan and progress stand here."), padding=False)
        with gr.Column(visible=False) as result:
            shown = _result()
            push = _push(login)
        view = {"plan": plan, "status": status, "go": go, "look": look, "stop": stop, "result": result, **shown}
        _connect(visitors, form, view, push, login)
        demo.unload(_leave(visitors))
    return demo.queue(max_size=WAITING, default_concurrency_limit=8)


# ------------------------------------------------------------------------------------------------- parts


def _form() -> tuple[list[gr.components.Component], gr.Button, gr.Button, gr.Button]:
    model = gr.Textbox(
        POCKET,
        label="Model",
        elem_id="model",
        max_length=96,
        info="'pocket' is bundled; or owner/name of a small public model",
    )
    sparsity = gr.Dropdown(
        list(SPARSITIES), value="50%", label="Sparsity", elem_id="sparsity", info="2:4: two of every four weights stay"
    )
    mix = gr.Radio(
        [(f"{name}: {what}", name) for name, what in MIXES.items()], value="uniform", label="Calibration mix"
    )
    with gr.Accordion("More settings", open=False):
        names = list(calibration_sources())
        sources = gr.Dropdown(names, multiselect=True, label="Sources", info="None: those that belong to the mix")
        samples = gr.Slider(*SAMPLES, value=16, step=1, label="Samples", info="of 256 tokens")
        measured = gr.CheckboxGroup(list(CAPABILITIES), value=list(CAPABILITIES), label="Capabilities to measure")
        legend = gr.HTML(figures.legend(calibration_sources()), padding=False)
    with gr.Row():
        go = gr.Button("Prune", variant="primary")
        look = gr.Button("Show the plan")
        stop = gr.Button("Stop", variant="stop", visible=False)

    def choices(name: str) -> tuple[Any, str]:
        table = calibration_sources(POCKET if name.strip() == POCKET else "")
        return gr.update(choices=list(table), value=[]), figures.legend(table)

    model.change(choices, model, [sources, legend], show_progress="hidden", **PRIVATE)
    return [model, mix, sources, sparsity, samples, measured], go, look, stop


def _result() -> dict[str, gr.components.Component]:
    gr.Markdown("## What was kept")
    shown = {"headline": gr.HTML(padding=False), "retention": gr.HTML(padding=False)}
    with gr.Accordion("All scores", open=False):
        shown["table"] = gr.HTML(padding=False)
    gr.Markdown("## What changed in each module")
    shown["heat_map"] = gr.HTML(padding=False)
    with gr.Accordion("Model card", open=False):
        shown["card"] = gr.Markdown(elem_classes="cp-card")
    shown["download"] = gr.DownloadButton("Download the pruned model")
    return shown


def _push(login: bool) -> list[Any]:
    gr.Markdown("## Push it to the Hub")
    if login:
        gr.LoginButton()
    with gr.Row():
        repo = gr.Textbox(label="Repo", elem_id="repo", placeholder="you/pocket-50", max_length=96)
        token = gr.Textbox(
            label="Your token",
            elem_id="token",
            type="password",
            max_length=200,
            info="with the right to write; used once, kept nowhere",
        )
    with gr.Row():
        private = gr.Checkbox(label="Private")
        create_pr = gr.Checkbox(label="Open a pull request instead of committing")
    button = gr.Button("Push")
    return [button, gr.HTML(padding=False), repo, token, private, create_pr]


# -------------------------------------------------------------------------------------------------- events


def _connect(visitors: Visitors, form: list[Any], view: dict[str, Any], push: list[Any], login: bool) -> None:
    def update(**values: Any) -> dict[Any, Any]:
        return {view[name]: value for name, value in values.items()}

    def idle(text: str, kind: str = "error") -> dict[Any, Any]:
        ready = {
            "go": gr.update(interactive=True),
            "look": gr.update(interactive=True),
            "stop": gr.update(visible=False),
        }
        return update(status=figures.message(text, kind), **ready)

    def wait() -> dict[Any, Any]:
        busy = {"go": gr.update(interactive=False), "look": gr.update(interactive=False)}
        return update(plan="", status=figures.waiting(), **busy)

    def wait_for_result(request: gr.Request) -> dict[Any, Any]:
        visitors.expect(_key(request))
        return wait() | update(result=gr.update(visible=False), stop=gr.update(visible=True))

    def prune(
        model: str, mix: str, sources: list, sparsity: str, samples: int, measured: list, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        try:
            run = visitors.begin(_key(request), checked(model, mix, sources, sparsity, samples, measured))
        except ValueError as error:
            yield idle(sentence(error))
            return
        while run.wait(EVERY):
            yield update(plan=run.plan_text, status=figures.progress(run.stage, run.done, run.total, run.detail))
        if run.record is None:
            yield idle(run.error, "note" if run.error == STOPPED else "error")
            return
        record = run.record
        yield idle("Done. The result stands below.", "note") | update(
            result=gr.update(visible=True),
            headline=figures.headline(record),
            retention=figures.retention(record),
            table=figures.table(record),
            heat_map=figures.heat_map(record),
            card=figures.card(run.folder / "model"),
            download=gr.update(value=str(next(run.shelf.glob("*.zip")))),
        )

    def show_plan(*values: Any) -> dict[Any, Any]:
        try:
            return idle("This is the plan; press Prune to go on.", "note") | update(
                plan=plan_of(checked(*values), visitors.root)
            )
        except EXPECTED as error:
            return idle(sentence(error))

    def halt(request: gr.Request) -> dict[Any, Any]:
        visitors.decline(_key(request))
        return idle(STOPPED, "note")

    everything = list(view.values())
    quiet = {"show_progress": "hidden", **PRIVATE}
    fields = {"inputs": form, "outputs": everything, **TURN, **quiet}
    pruned = view["go"].click(wait_for_result, None, everything, queue=False, **quiet).then(prune, **fields)
    planned = view["look"].click(wait, None, everything, queue=False, **quiet).then(show_plan, **fields)
    view["stop"].click(halt, None, everything, queue=False, **quiet)
    for event in (pruned, planned):
        event.failure(
            lambda: idle("This did not work: the queue may be full. Try again later."), None, everything, **quiet
        )
    button, said, *entered = push

    def upload(
        repo: str, token: str, private: bool, create_pr: bool, request: gr.Request, owner: str | None = None
    ) -> str:
        try:
            url = _upload(visitors.result(_key(request)), repo, token or owner, private, create_pr)
        except EXPECTED as error:
            return figures.message(sentence(error), "error")
        return figures.link("Pushed", url)

    def upload_logged_in(
        repo: str, token: str, private: bool, create_pr: bool, request: gr.Request, oauth: gr.OAuthToken | None
    ) -> str:
        return upload(repo, token, private, create_pr, request, oauth.token if oauth is not None else None)

    button.click(upload_logged_in if login else upload, entered, said, **PRIVATE)


def _key(request: gr.Request) -> str:
    """What tells a visitor from all others."""
    if not request.session_hash:
        raise gr.Error(
            "This needs a session, so that nobody gets your result: call it with gradio_client.", print_exception=False
        )
    return request.session_hash


def _leave(visitors: Visitors) -> Any:
    def leave(request: gr.Request) -> None:
        visitors.leave(_key(request))

    return leave


def _upload(run: Run, repo: str, token: str | None, private: bool, create_pr: bool) -> str:
    name = checked_repo(repo)
    if not token or not token.strip():  # never the token of this Space
        raise ValueError("Log in, or give a token of yours that may write: nothing is pushed in another's name.")
    folder = run.folder / "model"
    try:
        commit = push_folder(folder, name, private=True if private else None, token=token, create_pr=create_pr)
    except EXPECTED as error:
        raise ValueError(sentence(error, folder)) from error
    return commit.pr_url or commit.commit_url


# ----------------------------------------------------------------------------------------------------- API


def _api(visitors: Visitors) -> None:
    def job(*values: Any) -> Job:
        try:
            return checked(*values)
        except ValueError as error:
            raise gr.Error(sentence(error), print_exception=False) from None

    def plan(
        model: str = "pocket",
        mix: str = "uniform",
        sources: list[str] | None = None,
        sparsity: str = "50%",
        samples: int = 16,
        capabilities: list[str] | None = None,
    ) -> str:
        """What a run would do, with its memory and time, as Markdown. Nothing is pruned."""
        try:
            return plan_of(job(model, mix, sources, sparsity, samples, capabilities or CAPABILITIES), visitors.root)
        except EXPECTED as error:
            raise gr.Error(sentence(error), print_exception=False) from None

    def prune(
        model: str = "pocket",
        mix: str = "uniform",
        sources: list[str] | None = None,
        sparsity: str = "50%",
        samples: int = 16,
        capabilities: list[str] | None = None,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> str:
        """Prunes a model and measures what was kept; the answer is the record of the run as JSON. One run at a time."""
        try:
            asked = job(model, mix, sources, sparsity, samples, capabilities or CAPABILITIES)
            run = visitors.begin(_key(request), asked)
        except ValueError as error:
            raise gr.Error(sentence(error), print_exception=False) from None
        while run.wait(EVERY):
            pass
        if run.record is None:
            raise gr.Error(run.error, print_exception=False)
        return run.record.to_json()  # a client would take what a dict calls a path for a file

    def stop(request: gr.Request) -> bool:
        """Stops the run of this session; whether there was one."""
        return visitors.stop(_key(request))

    def push(repo: str, token: str, private: bool = False, create_pr: bool = False, request: gr.Request = None) -> str:  # type: ignore[assignment]
        """Uploads the result of this session to a repo of the token's owner; the answer is the address of the commit."""
        try:
            return _upload(visitors.result(_key(request)), repo, token, private, create_pr)
        except EXPECTED as error:
            raise gr.Error(sentence(error), print_exception=False) from None

    gr.api(plan, api_name="plan", **TURN)
    gr.api(prune, api_name="prune", **TURN)
    gr.api(stop, api_name="stop", queue=False)
    gr.api(push, api_name="push")


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing stays behind then, either
    shutil.rmtree(ROOT, ignore_errors=True)  # of a server that was killed
    on_a_space = "SPACE_ID" in os.environ  # elsewhere the button would hand out the token of whoever runs this
    demo = build_demo(Visitors(ROOT / "visitors", ROOT / "files"), login=on_a_space)
    try:
        demo.launch(
            theme=theme(), css_paths=HERE / "style.css", max_file_size="1kb", ssr_mode=False, footer_links=["api"]
        )
    finally:
        shutil.rmtree(ROOT, ignore_errors=True)


if __name__ == "__main__":
    main()
