# SPDX-License-Identifier: Apache-2.0
"""The view Big models: what is too large for this page, on the visitor's own machine or on one that they rent."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

import fields
import figures
import jobs
from estimate import ASSUMED, Estimate, estimates, shape_of
from events import PRIVATE, QUIET
from hardware import flavors
from limits import BIG_SAMPLES, HOURS, MIXES, PROCESSES, SPARSITIES, checked_big, checked_token, whole
from optimum_calibprune import ModelShape, calibration_sources
from watch import sentence


Cost = tuple[float, float]  # dollars an hour, hours at worst
ESTIMATE = "What it takes stands here."
LIGHT = {"concurrency_id": "estimate", "concurrency_limit": 1, **PRIVATE}
ABOUT = """Models that do not fit into this page. Here you get the command for a machine of your own, and an estimate of what the run takes
on one that Hugging Face rents out by the minute; from here you can start it there, too, on your own account."""


def big_view(root: Path, login: bool) -> None:
    with gr.Tab("Big models", elem_id="big"):
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                form, estimated, processes = _form()
                with gr.Row():
                    show = gr.Button("Show the command")
                    look = gr.Button("Estimate", variant="primary")
            with gr.Column(scale=3, min_width=300):
                command = gr.Code(
                    language="shell",
                    label="On a machine of your own",
                    lines=2,
                    interactive=False,
                    wrap_lines=True,
                )
                table = gr.HTML(figures.message(ESTIMATE), padding=False)
        gr.Markdown("## Run it on Hugging Face Jobs")
        with gr.Row():
            flavor = gr.Dropdown(
                [], label="Hardware", elem_id="flavor", info="those of the estimate, the cheapest first"
            )
            hours = gr.Slider(*HOURS, value=4, step=1, label="Hours", info="after which it is ended in any case")
            token = gr.Textbox(
                label="Your token",
                elem_id="big-token",
                type="password",
                max_length=200,
                info="with the rights to write and to run jobs; it goes with the job as its secret, and is kept nowhere else",
            )
        at_most = gr.HTML(padding=False)
        with gr.Row():
            start = gr.Button("Start the job")
            ask = gr.Button("How is it going?", visible=False)
            end = gr.Button("Cancel the job", variant="stop", visible=False)
        said = gr.HTML(padding=False)
        job_id, costs = gr.State(""), gr.State({})

    def show_command(*values: Any) -> str:
        *asked, count = values
        try:
            typed = checked_big(*asked).command(whole("The number of GPUs", count, PROCESSES))
        except ValueError as error:
            return f"# {sentence(error)}"
        return f"pip install {shlex.quote(jobs.package())}\n{typed}\n"

    def estimate(login: Login, *values: Any) -> tuple[str, dict[str, Cost], Any]:
        *asked, given = values
        try:
            job = checked_big(*asked)
            own = given or login.token
            shape = shape_of(job, checked_token(own) if own else None, root)
            found = estimates(shape, flavors())
        except Exception as error:
            return no_estimate(figures.message(sentence(error), "error"))
        choices = [(f"{entry.flavor.name} ({entry.flavor.gpu})", entry.flavor.name) for entry in found]
        known = {entry.flavor.name: (entry.flavor.dollars_per_hour, entry.hours[1]) for entry in found}
        return estimate_table(job.model, shape, found), known, fields.chosen_from(choices, value=choices[0][1])

    def begin(login: Login, *values: Any) -> tuple[str, Any, Any, Any, Any]:
        *asked, chosen, ends, given = values
        try:
            job = checked_big(*asked)
            if not given:
                login.check(whole("The number of hours", ends, HOURS))
            started = jobs.launch(job, chosen, ends, given or login.token)
        except Exception as error:
            return figures.message(sentence(error), "error"), gr.skip(), gr.skip(), gr.skip(), gr.skip()
        shown = gr.update(visible=True)
        return _started(started.id, started.url), started.id, gr.update(interactive=False), shown, shown

    def tell(login: Login, job: str, given: str) -> tuple[str, Any]:
        try:
            found = jobs.state(job, given or login.token)
        except Exception as error:
            return figures.message(sentence(error), "error"), gr.skip()
        stage = found.status.stage
        over = gr.update(interactive=True) if stage in jobs.OVER else gr.skip()
        return figures.link(f"State of the job: {stage.lower()}", found.url), over

    def stop(login: Login, job: str, given: str) -> tuple[str, Any]:
        try:
            jobs.cancel(job, given or login.token)
        except Exception as error:
            return figures.message(sentence(error), "error"), gr.skip()
        return figures.message("The job is cancelled."), gr.update(interactive=True)

    show.click(show_command, [*form, processes], command, **PRIVATE)
    look.click(_as_owner(estimate, login), [*form, token], [table, costs, flavor], **LIGHT)
    for field in estimated:  # what the estimate was for
        field.change(no_estimate, None, [table, costs, flavor], queue=False, **QUIET)
    flavor.change(enough_hours, [costs, flavor], hours, **QUIET)
    for field in (flavor, hours):
        field.change(most_it_costs, [costs, flavor, hours], at_most, **QUIET)
    # A second click would be a second job that its visitor pays.
    start.click(_as_owner(begin, login), [*form, flavor, hours, token], [said, job_id, start, ask, end], **LIGHT)
    ask.click(_as_owner(tell, login), [job_id, token], [said, start], **PRIVATE)
    end.click(_as_owner(stop, login), [job_id, token], [said, start], **PRIVATE)


def _form() -> tuple[list[gr.components.Component], list[gr.components.Component], gr.components.Component]:
    """The fields of a run elsewhere, those of them that decide what it takes, and how many GPUs the command is for."""
    model = fields.model("big-", here=False)
    sparsity = gr.Dropdown(list(SPARSITIES), value="50%", label="Sparsity", elem_id="big-sparsity")
    mixes = [(f"{name}: {what}", name) for name, what in MIXES.items()]
    mix = gr.Dropdown(mixes, value="uniform", label="Calibration mix", elem_id="big-mix")
    repo = gr.Textbox(
        label="Push to", elem_id="big-repo", placeholder="you/name-50", max_length=96, info="needed for a job"
    )
    private = gr.Checkbox(label="as a private repo")
    with gr.Accordion("More settings", open=False):
        table = list(calibration_sources(""))
        sources = gr.Dropdown(table, multiselect=True, label="Sources", info="None: those that belong to the mix")
        samples = gr.Slider(*BIG_SAMPLES, value=128, step=1, label="Samples", info="of up to 2,048 tokens")
        measure = gr.Checkbox(True, label="Measure capabilities, where the model fits into memory")
        processes = gr.Slider(*PROCESSES, value=1, step=1, label="GPUs of your machine")
    estimated = [model, mix, sources, sparsity, samples, measure]
    return [*estimated, repo, private], estimated, processes


def estimate_table(model: str, shape: ModelShape, found: Sequence[Estimate]) -> str:
    """What a run takes on each hardware, as HTML."""
    rows = "".join(_row(entry) for entry in found)
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("", "needed", "hours", "dollars"))
    return (
        f'<p class="cp-headline">{escape(model)}: <b>{shape.parameters / 1e9:,.1f}</b> billion parameters, '
        f"{shape.weight_bytes / 2**30:,.1f} GiB.</p>"
        f'<div class="cp-scroll"><table class="cp-table cp-estimate"><tr>{head}</tr>{rows}</table></div>'
        f'<p class="cp-note">{escape(ASSUMED)}</p>'
    )


def _row(entry: Estimate) -> str:
    gpu = f"{entry.flavor.gpu}, {entry.flavor.memory / 1e9:,.0f} GB"
    where = "block by block" if entry.plan.streamed else "all at once"
    return (
        f"<tr><th scope='row'>{escape(entry.flavor.name)}<br><small>{escape(gpu)}</small></th>"
        f"<td>{entry.gpu_bytes / 1e9:,.0f} GB<br><small>{where}</small></td>"
        f"<td>{_between(*entry.hours, '{:,.1f}')}</td><td>{_between(*entry.dollars, '{:,.2f}')}</td></tr>"
    )


def _between(low: float, high: float, form: str) -> str:
    return f"{form.format(low)} to {form.format(high)}"


def no_estimate(text: str = figures.message(ESTIMATE)) -> tuple[str, dict[str, Cost], Any]:
    """A text in its place, and no hardware to choose from."""
    return text, {}, gr.update(choices=[], value=None)


def enough_hours(costs: dict[str, Cost], flavor: str | None) -> Any:
    """Twice what the run takes at worst, so that no job is ended, and paid, without a result."""
    return min(HOURS[1], math.ceil(2 * costs[flavor][1])) if flavor in costs else gr.skip()


def most_it_costs(costs: dict[str, Cost], flavor: str | None, hours: float) -> str:
    """What a job is ended at, in hours and dollars."""
    if flavor not in costs:
        return ""
    price, worst = costs[flavor]
    text = f"Ended after {hours:g} hours at the latest: at most ${price * hours:,.2f} at ${price:,.2f} an hour, on your account."
    if hours < worst:
        return figures.message(
            f"{text} It may take {worst:,.1f} hours, and would be ended, and paid, without a result.", "error"
        )
    return figures.message(text)


def _started(job_id: str, url: str) -> str:
    return figures.link("The job is started", url) + figures.message(
        f"To cancel it elsewhere: hf jobs cancel {job_id}"
    )


@dataclass(frozen=True)
class Login:
    """The token of a visitor who has logged in, or none, and until when it is good (seconds since 1970)."""

    token: str | None = None
    expires_at: float = 0.0

    def check(self, hours: int) -> None:
        """`ValueError` where it ends before a job of so many hours, which pushes last of all."""
        if self.token and self.expires_at < time.time() + 3600 * hours:
            raise ValueError(
                f"Your login ends before {hours} hours are over, and the job could not push its result. Log in again, ask for "
                "fewer hours, or give a token of yours."
            )


def _as_owner(handler: Callable[..., Any], login: bool) -> Callable[..., Any]:
    """The handler with the login of its visitor before the other values."""

    def logged_in(oauth: gr.OAuthToken | None, *values: Any) -> Any:
        return handler(Login(oauth.token, oauth.expires_at) if oauth is not None else Login(), *values)

    def nobody(*values: Any) -> Any:
        return handler(Login(), *values)

    return logged_in if login else nobody
