# SPDX-License-Identifier: Apache-2.0
"""A record as HTML: every number is there, and a name from elsewhere stays text."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.publishing.pushing import saved_run
from tests.publishing.run_record import example


sys.path.insert(0, str(Path(__file__).parents[2] / "space"))

import figures


def test_each_capability_has_its_bar_interval_and_number() -> None:
    run = example()
    html = figures.retention(run)
    for entry in run.capabilities.capabilities:
        assert f">{entry.capability}</span>" in html
        if entry.retention is None:
            assert "undefined" in html
        else:
            assert f"{100 * entry.retention:.1f} %" in html
            low, high = entry.interval
            assert f"{100 * low:.1f} to {100 * high:.1f}" in html
    for name, why in run.capabilities.not_measured.items():
        assert f">{name}</span>" in html
        assert why in html


def test_the_heat_map_has_error_and_zeros_of_each_module() -> None:
    html = figures.heat_map(example())
    assert html.count("<td style=") == 2
    assert "model.layers.0.mlp.up_proj: relative error 6.25%, 62.50% zeros" in html
    assert ">12.5<small>60.2</small></td>" in html  # down_proj: 77 of 128
    assert "--cp-shade:80%" in html  # the largest error
    assert "--cp-shade:40%" in html


def test_the_card_is_shown_without_front_matter_and_pictures(tmp_path: Path) -> None:
    text = figures.card(saved_run(tmp_path / "run"))
    assert text.startswith("# ")
    assert [part for part in ("---\nlanguage", "<!--", "<picture", "![", "figures/") if part in text] == []
    assert "## What was kept" in text


@pytest.mark.parametrize("bad", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'])
def test_names_from_elsewhere_stay_text(bad: str) -> None:
    run = example()
    layer = replace(run.prune.layers[0], module=f"model.layers.0.{bad}")
    run = replace(run, base=replace(run.base, name=bad), prune=replace(run.prune, layers=(layer,)))
    shown = [figures.headline(run), figures.heat_map(run), figures.progress("prune", 1, 2, bad)]
    shown += [
        figures.message(bad),
        figures.link("Pushed", f"https://x/{bad}"),
        figures.link("Pushed", f"javascript:{bad}"),
    ]
    assert not [html for html in shown if "<script" in html or "<img" in html or 'href="javascript' in html]
    assert "&lt;" in shown[0]


def test_the_stage_that_is_going_on_is_marked() -> None:
    html = figures.progress("prune", 21, 42, "model.layers.3.mlp.up_proj")
    assert html.count("cp-done") == 4
    assert html.count("cp-now") == 1
    assert "21 of 42" in html
    assert "width:50%" in html
