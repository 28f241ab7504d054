# SPDX-License-Identifier: Apache-2.0
"""The fields that forms have in common."""

from __future__ import annotations

from typing import Any

import gradio as gr

import limits
import search
from events import QUIET
from limits import CAPABILITIES, POCKET, SAMPLES, SPARSITIES, WEIGHT_BYTES


# What stands in a field, finished or not, once no key has changed it for a moment; until then what stood there `before`.
TYPED = """before => new Promise(done => {
    const read = () => document.querySelector("#ID input")?.value ?? "", now = read();
    setTimeout(() => done(read() === now ? now : before), 250);
})"""


def model(prefix: str = "", here: bool = True) -> gr.Dropdown:
    """A name, under which models of the Hub stand that hold what is typed: with `here`, those that this page can prune, after
    the pocket. Any other name may be typed, too."""
    bundled = [POCKET] if here else []
    field = gr.Dropdown(
        bundled,
        value=POCKET if here else "",
        label="Model",
        elem_id=f"{prefix}model",
        allow_custom_value=True,
        info=f"'pocket' is bundled; or type a part of the name of a public model, up to {WEIGHT_BYTES / 2**30:.0f} GiB"
        if here
        else "owner/name; type a part of it",
    )
    typed = gr.Textbox(visible="hidden")

    async def suggest(typed: str) -> Any:
        choices = [*bundled, *await search.names(typed, small=here)]
        return chosen_from(choices) if choices else gr.skip()

    field.focus(None, js="() => document.activeElement.select()", **QUIET)  # so that a key replaces what stands there
    field.key_up(None, typed, typed, js=TYPED.replace("ID", field.elem_id), **QUIET)
    # Outside the queue, in which runs wait; of what is typed during a search, only the last is searched for next.
    typed.change(suggest, typed, field, queue=False, trigger_mode="always_last", **QUIET)
    return field


def chosen_from(choices: list[Any], **further: Any) -> dict[str, Any]:
    """The update of a list of choices, which may be open: how many stands first, since one that gets shorter would otherwise
    draw those that are gone once more, and fail."""
    return gr.update(num_choices_shown=len(choices), choices=choices, **further)


def mixes(name: object) -> list[tuple[str, str]]:
    """What a mix is chosen from, for the model that stands in the field: each as it is shown, and its name."""
    offered = limits.mixes(table_of(name))
    return [(f"{mix.removeprefix(limits.ALONE)}: {what}", mix) for mix, what in offered.items()]


def sparsity(prefix: str = "") -> gr.Dropdown:
    return gr.Dropdown(
        list(SPARSITIES),
        value="50%",
        label="Sparsity",
        elem_id=f"{prefix}sparsity",
        info="2:4: two of every four weights stay",
    )


def samples() -> gr.Slider:
    return gr.Slider(*SAMPLES, value=16, step=1, label="Samples", info="of 256 tokens")


def capabilities() -> gr.CheckboxGroup:
    return gr.CheckboxGroup(list(CAPABILITIES), value=list(CAPABILITIES), label="Capabilities to measure")


def table_of(name: object) -> str:
    """The model whose table of sources holds for what stands in the field, finished or not."""
    return POCKET if str(name).strip() == POCKET else ""
