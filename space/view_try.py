# SPDX-License-Identifier: Apache-2.0
"""The view Try it: a prompt, and the answers of the dense model and of the pruned one beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

import figures
from answers import AnswerRun
from events import QUIET, Desk, Update, key_of
from limits import NEW_TOKENS, PROMPT_CHARACTERS, TEMPERATURE, checked_question
from visitors import Visitors
from watch import STATES, sentence


EVERY = 0.1  # seconds between two looks at the answers
PROMPTS = [
    "Question: What is the capital of Canada?\nAnswer:",
    "Question: Tom has 21 apples. Tom finds 8 apples. How many apples does Tom have now?\nAnswer:",
    'def factorial(n):\n    """Compute n factorial."""',
    "Ella was hungry. So Ella",
]
NOTHING = "There is nothing to try yet: prune a model first, under the tab Prune."


def try_view(visitors: Visitors) -> None:
    with gr.Tab("Try it") as tab:
        about = gr.HTML(figures.message(NOTHING), padding=False)
        prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=3, max_length=PROMPT_CHARACTERS, elem_id="prompt")
        gr.Examples(PROMPTS, prompt, label="Prompts of the kind that the pocket knows", api_visibility="private")
        with gr.Accordion("More settings", open=False):
            new_tokens = gr.Slider(*NEW_TOKENS, value=64, step=1, label="New tokens")
            temperature = gr.Slider(*TEMPERATURE, value=0, step=0.1, label="Temperature", info="0: no chance in it")
        with gr.Row():
            go = gr.Button("Answer", variant="primary")
            stop = gr.Button("Stop", variant="stop", visible=False)
        said, asked = gr.HTML(padding=False), gr.State("")  # the result that the answers are of
        with gr.Row():
            answers = {}
            for state in STATES:
                with gr.Column(min_width=300):  # under each other on a phone
                    answers[state] = gr.HTML(padding=False)
    desk = Desk(AnswerRun, (go,), stop, said)

    def side_by_side(run: AnswerRun) -> Update:
        texts = [run.texts[state] for state in STATES]
        return {
            answers[state]: figures.answer(state, text, other)
            for state, text, other in zip(STATES, texts, reversed(texts), strict=True)
        }

    def answer(request: gr.Request, *values: Any) -> Iterator[Update]:
        try:
            run = visitors.answer(key_of(request), checked_question(*values))
        except ValueError as error:
            yield desk.ended(sentence(error))
            return
        for _ in run.looks(EVERY):
            yield side_by_side(run) | {said: figures.message("Both models answer.")}
        ended = desk.ended(run.error) if run.error else desk.ready("Done.", "note")
        yield ended | side_by_side(run)

    def look(before: str, request: gr.Request) -> Update:
        try:
            result = visitors.result(key_of(request))
        except ValueError:
            text, name = NOTHING, ""
        else:
            text, name = f"{result.job.model}: dense, and at {result.job.sparsity} sparsity.", result.folder.name
        known = {about: figures.message(text), asked: name}
        return known if name == before else known | dict.fromkeys((said, *answers.values()), "")

    desk.on_click(
        go, answer, [prompt, new_tokens, temperature], [*answers.values()], visitors=visitors,
        first=dict.fromkeys(answers.values(), ""),
    )  # fmt: skip
    desk.on_stop(visitors)
    tab.select(look, asked, [about, asked, said, *answers.values()], queue=False, **QUIET)
