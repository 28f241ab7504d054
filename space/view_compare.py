# SPDX-License-Identifier: Apache-2.0
"""The view Compare mixes: two to four mixes are run after each other, and the latest runs stand side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

import comparison
import fields
import figures
from events import EVERY, QUIET, Desk, Update, key_of
from limits import ALONE, COMPARED, POCKET, checked_mixes
from runs import CompareRun
from visitors import Visitors
from watch import sentence


PROPOSED = ["uniform", f"{ALONE}thealgorithms", f"{ALONE}gsm8k"]
NOTHING = "Nothing to compare yet. What you prune is kept here, too: the latest four runs, until you leave."


def compare_view(visitors: Visitors) -> None:
    with gr.Tab("Compare mixes") as tab:
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                form = _form()
                with gr.Row():
                    go = gr.Button("Compare", variant="primary")
                    stop = gr.Button("Stop", variant="stop", visible=False)
            with gr.Column(scale=3, min_width=300):
                said = gr.HTML(
                    figures.message("Each mix prunes the same dense model, which is measured once."), padding=False
                )
        gr.Markdown("## What each mix kept")
        summary, bars = gr.HTML(figures.message(NOTHING), padding=False), gr.HTML(padding=False)
        with gr.Column(visible=False) as more:
            with gr.Accordion("All scores", open=False):
                table = gr.HTML(padding=False)
            clear = gr.Button("Forget these runs", size="sm")
    desk = Desk(CompareRun, (go, clear), stop, said)
    shown = [summary, bars, table, more]

    def side_by_side(key: str) -> Update:
        records = visitors.records(key)
        if not records:
            return {summary: figures.message(NOTHING), bars: "", table: "", more: gr.update(visible=False)}
        drawn = {
            summary: comparison.summary(records),
            bars: comparison.bars(records),
            table: comparison.table(records),
        }
        return drawn | {more: gr.update(visible=True)}

    def compare(request: gr.Request, *values: Any) -> Iterator[Update]:
        key = key_of(request)
        try:
            run = visitors.compare(key, checked_mixes(*values))
        except ValueError as error:
            yield desk.ended(sentence(error))
            return
        finished = 0
        for _ in run.looks(EVERY):
            found = side_by_side(key) if len(run.records) > finished else {}
            finished = len(run.records)
            yield {said: _progress(run, finished)} | found
        ended = desk.ended(run.error) if run.error else desk.ready("Done. The figure stands below.", "note")
        yield ended | side_by_side(key)

    def clear_all(request: gr.Request) -> Update:
        visitors.forget_records(key_of(request))
        return side_by_side(key_of(request))

    def look(request: gr.Request) -> Update:
        return side_by_side(key_of(request))

    desk.on_click(go, compare, form, shown, visitors=visitors, first={})
    desk.on_stop(visitors)
    clear.click(clear_all, None, shown, queue=False, **QUIET)
    tab.select(look, None, shown, queue=False, **QUIET)


def _form() -> list[gr.components.Component]:
    model = fields.model("compare-")
    chosen = gr.Dropdown(
        fields.mixes(POCKET),
        value=PROPOSED,
        multiselect=True,
        max_choices=COMPARED[1],
        label="Mixes",
        elem_id="mixes",
        info=f"{COMPARED[0]} to {COMPARED[1]}; a source alone is one, too",
    )
    sparsity = fields.sparsity("compare-")
    with gr.Accordion("More settings", open=False):
        samples, measured = fields.samples(), fields.capabilities()

    def offer(name: str, before: list[str]) -> Any:
        choices = fields.mixes(name)
        known = {mix for _, mix in choices}
        return fields.chosen_from(choices, value=[mix for mix in before if mix in known])

    model.change(offer, [model, chosen], chosen, **QUIET)
    return [model, chosen, sparsity, samples, measured]


def _progress(run: CompareRun, finished: int) -> str:
    """Which mix, and where in it."""
    number = min(finished + 1, len(run.jobs))
    mix = run.jobs[number - 1].mix.removeprefix(ALONE)
    text = f"Mix {number} of {len(run.jobs)}: {mix}"
    return figures.message(text) + figures.progress(run.stage, run.done, run.total, run.detail)
