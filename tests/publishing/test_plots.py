# SPDX-License-Identifier: Apache-2.0
"""Figures show the numbers that they are given: pixels are read back."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from optimum_calibprune.publishing import plots
from optimum_calibprune.records import CAPABILITIES


GROUPS = [
    ("general sources", [("c4", [0.9, 0.0, None]), ("a name that is rather long", [1.0, 0.5, 0.75])]),
    ("mixes", [("uniform", [0.2, 0.4, 0.3])]),
]


def pixels(path: Path, colour: str) -> np.ndarray:
    """Where the figure has exactly this colour."""
    return (np.abs(imread(path)[..., :3] - np.array(to_rgb(colour))) < 1.5 / 255).all(axis=-1)


def test_a_heat_map_has_a_darker_cell_for_a_larger_share(tmp_path: Path) -> None:
    path = plots.heat_map(tmp_path / "new" / "map.png", "Title", ["general", "code", "total"], GROUPS, "a note")
    assert pixels(path, "#0B4F83").sum() > 3000  # 100 %
    assert pixels(path, "#F7FAFC").sum() > 3000  # 0 %
    assert pixels(path, plots.COLOURS["general"]).sum() > 200  # the bar beside general sources
    assert pixels(path, plots.COLOURS["code"]).sum() > 0  # the heading of a column


def test_a_longer_label_and_more_rows_make_a_larger_figure(tmp_path: Path) -> None:
    short = plots.heat_map(tmp_path / "a.png", "Title", ["code"], [("mixes", [("a", [0.5])])])
    long = plots.heat_map(tmp_path / "b.png", "Title", ["code"], [("mixes", [("a" * 40, [0.5]), ("b", [0.5])])])
    assert imread(long).shape[0] > imread(short).shape[0]
    assert imread(long).shape[1] > imread(short).shape[1] + 400


def test_a_wider_interval_is_a_longer_line(tmp_path: Path) -> None:
    widths = []
    for low in (0.4, 0.2):
        points = [plots.Point("a", 0.5, (low, 0.6), strong=True), plots.Point("b", 0.1), plots.Point("c", 0.9)]
        path = plots.intervals(tmp_path / f"{low}.png", "Title", "per cent", points)
        places = np.flatnonzero(pixels(path, plots.LINES[0]).any(axis=0))
        widths.append(places.max() - places.min())
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.1)


def test_hollow_points_are_not_filled(tmp_path: Path) -> None:
    filled, hollow = (
        plots.correlations(tmp_path / f"{p}.png", "Title", ["perplexity"], {"math": [(0.5, None, p)]})
        for p in (0.01, 0.2)
    )
    colour = plots.COLOURS["math"]
    assert pixels(filled, colour).sum() > pixels(hollow, colour).sum() + 50


def test_each_outcome_has_a_panel_in_its_colour_and_what_is_undefined_says_so(tmp_path: Path) -> None:
    found = {name: [(0.5, (0.1, 0.8), 0.01), (None, None, None)] for name in CAPABILITIES}
    path = plots.correlations(tmp_path / "c.png", "Title", ["perplexity", "4-gram duplicates"], found, "note")
    centres = [np.flatnonzero(pixels(path, plots.COLOURS[name]).any(axis=0)).mean() for name in CAPABILITIES]
    assert centres == sorted(centres)
    assert len(set(plots.COLOURS.values())) == len(CAPABILITIES)


def test_a_curve_rises_where_its_numbers_rise(tmp_path: Path) -> None:
    points = [(x / 10, x / 20, (x / 20 - 0.01, x / 20 + 0.01)) for x in (3, 5, 7)]
    path = plots.curves(
        tmp_path / "curve.png", "Title", "sparsity", [("Total", {"a": points}), ("Margin", {"a": points})]
    )
    rows, columns = np.nonzero(pixels(path, plots.LINES[0]))
    left = columns < columns.min() + 40
    right = (columns > columns.min() + 400) & (columns < columns.min() + 500)
    assert rows[left].mean() > rows[right].mean()


def test_the_same_numbers_make_the_same_bytes(tmp_path: Path) -> None:
    first, second = (plots.heat_map(tmp_path / f"{i}.png", "T", ["a", "b", "c"], GROUPS).read_bytes() for i in (1, 2))
    assert first == second


def test_missing_matplotlib_is_noticed_and_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plots.available()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not plots.available()
    assert "pip install 'optimum-calibprune[plots]'" in plots.MISSING
