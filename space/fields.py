# SPDX-License-Identifier: Apache-2.0
"""The fields that forms have in common."""

from __future__ import annotations

import gradio as gr

from limits import CAPABILITIES, POCKET, SAMPLES, SPARSITIES


def model(prefix: str = "") -> gr.Textbox:
    return gr.Textbox(
        POCKET,
        label="Model",
        elem_id=f"{prefix}model",
        max_length=96,
        info="'pocket' is bundled; or owner/name of a small public model",
    )


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


def table_of(name: str) -> str:
    """The model whose table of sources holds for what stands in the field, finished or not."""
    return POCKET if name.strip() == POCKET else ""
