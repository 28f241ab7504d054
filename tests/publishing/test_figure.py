# SPDX-License-Identifier: Apache-2.0
"""The card's figure is drawn where there is something to draw, and the card shows it only then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from optimum_calibprune.publishing import figure, plots
from optimum_calibprune.publishing.card import FIGURE_NAME
from optimum_calibprune.records import CapabilityReport
from tests.publishing.run_record import example


def total_at(path: Path) -> float:
    """The middle of what has the colour of the total, as a share of the width."""
    pixels = imread(path)[..., :3]
    found = (np.abs(pixels - np.array(to_rgb(plots.LINES[0]))) < 1.5 / 255).all(axis=-1)
    return float(np.flatnonzero(found.any(axis=0)).mean() / pixels.shape[1])


def test_the_same_record_makes_the_same_bytes_and_another_total_lies_elsewhere(tmp_path: Path) -> None:
    run = example()
    more = replace(run, capabilities=replace(run.capabilities, total=0.6, total_interval=(0.55, 0.65)))
    for name, drawn in (("a", run), ("b", run), ("c", more)):
        assert figure.retention(drawn, tmp_path / name)
    a, b, c = (tmp_path / name / FIGURE_NAME for name in "abc")
    assert a.read_bytes() == b.read_bytes()
    assert total_at(c) > total_at(a) + 0.05


def test_nothing_to_draw_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = example()
    assert not figure.retention(replace(run, capabilities=None), tmp_path)
    assert not figure.retention(replace(run, capabilities=CapabilityReport((), None, None, None)), tmp_path)
    monkeypatch.setattr(plots, "available", lambda: False)
    assert not figure.retention(run, tmp_path)
    assert not list(tmp_path.iterdir())
