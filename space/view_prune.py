# SPDX-License-Identifier: Apache-2.0
"""The view Prune: the form, plan and progress beside it, and the result below."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

import fields
import figures
from events import EVERY, QUIET, Desk, Update, key_of
from limits import POCKET, checked
from optimum_calibprune import calibration_sources
from push import push_form
from runs import PruneRun, plan_of
from visitors import Visitors
from watch import sentence


BEGINNING = "Plan and progress stand here. A run ends with this tab; its result is kept for an hour at most."


def prune_view(visitors: Visitors, login: bool) -> None:
    with gr.Tab("Prune"):
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                form = _form()
                with gr.Row():
                    go = gr.Button("Prune", variant="primary")
                    look = gr.Button("Show the plan")
                    stop = gr.Button("Stop", variant="stop", visible=False)
            with gr.Column(scale=3, min_width=300):
                plan = gr.Markdown("")
                said = gr.HTML(figures.message(BEGINNING), padding=False)
        with gr.Column(visible=False) as result:
            shown = _result()
            pushed = push_form(visitors, login)
    desk = Desk(PruneRun, (go, look), stop, said)

    def prune(request: gr.Request, *values: Any) -> Iterator[Update]:
        try:
            run = visitors.prune(key_of(request), checked(*values))
        except ValueError as error:
            yield desk.ended(sentence(error))
            return
        for _ in run.looks(EVERY):
            yield {plan: run.plan_text, said: figures.progress(run.stage, run.done, run.total, run.detail)}
        if run.error:
            yield desk.ended(run.error) | {result: gr.update(visible=visitors.has_result(key_of(request)))}
            return
        found = {shown[name]: value for name, value in _shown(run).items()}
        yield (
            desk.ready("Done. The result stands below; compare it, or try it, under the other tabs.", "note")
            | {result: gr.update(visible=True)}
            | found
        )

    def show_plan(*values: Any) -> Update:
        try:
            text = plan_of(checked(*values), visitors.root)
        except Exception as error:
            return desk.ready(sentence(error))
        return desk.ready("This is the plan; press Prune to go on.", "note") | {plan: text}

    desk.on_click(
        go,
        prune,
        form,
        [plan, result, pushed, *shown.values()],
        visitors=visitors,
        first={plan: "", result: gr.update(visible=False), pushed: ""},
    )
    desk.on_click(look, show_plan, form, [plan], visitors=visitors, first={plan: ""}, stoppable=False)
    desk.on_stop(visitors)


def _form() -> list[gr.components.Component]:
    model, sparsity = fields.model(), fields.sparsity()
    mix = gr.Dropdown(fields.mixes(POCKET), value="uniform", label="Calibration mix", elem_id="mix")
    with gr.Accordion("More settings", open=False):
        names = list(calibration_sources())
        sources = gr.Dropdown(names, multiselect=True, label="Sources", info="None: those that belong to the mix")
        samples, measured = fields.samples(), fields.capabilities()
        legend = gr.HTML(figures.legend(calibration_sources()), padding=False)

    def offer(name: str, before: str) -> tuple[Any, Any, str]:
        table, offered = calibration_sources(fields.table_of(name)), fields.mixes(name)
        kept = before if before in [name for _, name in offered] else "uniform"
        return (
            fields.chosen_from(offered, value=kept),
            fields.chosen_from(list(table), value=[]),
            figures.legend(table),
        )

    model.change(offer, [model, mix], [mix, sources, legend], **QUIET)
    return [model, mix, sources, sparsity, samples, measured]


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


def _shown(run: PruneRun) -> dict[str, Any]:
    """The values of what `_result` makes."""
    record = run.record
    assert record is not None
    return {
        "headline": figures.headline(record),
        "retention": figures.retention(record),
        "table": figures.table(record),
        "heat_map": figures.heat_map(record),
        "card": figures.card(run.folder / "model"),
        "download": gr.update(value=str(next(run.shelf.glob("*.zip")))),
    }
