# SPDX-License-Identifier: Apache-2.0
"""A record as HTML: every number is there, and a name from elsewhere stays text."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.publishing.pushing import saved_run
from tests.publishing.run_record import example


sys.path.insert(0, str(Path(__file__).parents[2] / "space"))

import comparison
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
    shown += [figures.answer("dense", bad, other) for other in (bad, f"x{bad}", "")]
    shown += [
        comparison.summary([run, example()]),
        comparison.bars([run, example()]),
        comparison.table([run, example()]),
    ]
    assert not [html for html in shown if "<script" in html or "<img" in html or 'href="javascript' in html]
    assert "&lt;" in shown[0]


def test_the_stage_that_is_going_on_is_marked() -> None:
    html = figures.progress("prune", 21, 42, "model.layers.3.mlp.up_proj")
    assert html.count("cp-done") == 4
    assert html.count("cp-now") == 1
    assert "21 of 42" in html
    assert "width:50%" in html


def test_runs_stand_side_by_side_under_each_capability() -> None:
    run = example()
    other = replace(run, config=replace(run.config, mix="single:gsm8k"))
    measured = run.capabilities.measured
    html = comparison.bars([run, other])
    assert html.count('class="cp-row"') == 2 * (len(measured) + 1)  # and the total
    assert html.count("cp-fill-run-0") == html.count("cp-fill-run-1") == len(measured) + 1
    assert comparison.names([run, other]) == [str(run.config.mix), "gsm8k"]
    worst = next(entry for entry in run.capabilities.capabilities if entry.capability == run.capabilities.worst)
    said = comparison.summary([run, other])
    assert said.count(f"<b>{worst.capability}</b>: {100 * worst.retention:.1f} %") == 2
    assert "compare no totals" not in said
    for entry in run.capabilities.capabilities:
        assert comparison.table([run, other]).count(f"{entry.capability}, ") == 2


def test_names_tell_runs_apart_and_totals_of_other_capabilities_are_not_compared() -> None:
    run = example()
    sparser = replace(run, config=replace(run.config, sparsity="70%"))
    assert comparison.names([run, sparser]) == [f"{run.config.mix}, {run.config.sparsity}", f"{run.config.mix}, 70%"]
    fewer = replace(run.capabilities, capabilities=run.capabilities.capabilities[:1])
    assert "compare no totals" in comparison.summary([run, replace(run, capabilities=fewer)])


@pytest.mark.parametrize(
    ("text", "other", "marked"),
    [
        ("Ottawa is it", "Bamako is it", ["Ottawa"]),
        ("It is Ottawa.", "It is Oslo.", ["Ottawa."]),
        ("It is", "It is Oslo", []),
        ("same", "same", []),
    ],
)
def test_the_word_in_which_answers_part_is_marked(text: str, other: str, marked: list[str]) -> None:
    html = figures.answer("dense", text, other)
    assert re.findall("<mark>(.*?)</mark>", html) == marked
    assert re.sub("<.*?>", "", html) == f"dense{text}"
