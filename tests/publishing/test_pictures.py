# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run show its numbers, on light and dark pages, also to readers who do not tell red from green."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from transformers import AutoTokenizer

from optimum_calibprune import pocket
from optimum_calibprune.publishing import hub, pictures, plots
from optimum_calibprune.publishing.card import render
from optimum_calibprune.records import (
    CalibrationRow,
    CalibrationSet,
    CapabilityReport,
    CapabilityRetention,
    Scores,
    TaskScore,
)
from tests.publishing.run_record import example


def report(code: float) -> CapabilityReport:
    kept = (
        CapabilityRetention("general", 400, 0.25, 0.8, 0.6, 0.75, (0.7, 0.8), 0.636),
        CapabilityRetention("code", 100, 0.0, 0.5, code / 2, code, (code - 0.1, code + 0.1), code),
        CapabilityRetention("math", 10, 0.0, 0.0, 0.0, None, None, None),
    )
    return CapabilityReport(
        kept, (0.75 + code) / 2, (0.4, 0.7), "code", {"hellaswag": "gone", "commonsense": "no data"}
    )


def scores(value: float) -> Scores:
    items = tuple(float(i < 100 * value) for i in range(100))
    return Scores(
        (TaskScore("some_code", "code", "pass@1", 0.0, items), TaskScore("mmlu", "general", "", 0.25, items))
    )


def pixels(path: Path, colour: str) -> np.ndarray:
    """Where the picture has exactly this colour."""
    return (np.abs(imread(path)[..., :3] - np.array(to_rgb(colour))) < 1.5 / 255).all(axis=-1)


def width(path: Path, colour: str) -> int:
    columns = np.flatnonzero(pixels(path, colour).sum(axis=0) > 15)
    return columns.max() - columns.min()


def test_bars_are_as_long_as_what_was_kept_and_dense_is_the_line_at_100(tmp_path: Path) -> None:
    pictures.draw(tmp_path / "a", "a model", report(0.25), {})
    pictures.draw(tmp_path / "b", "a model", report(0.5), {})
    for name, theme in plots.THEMES.items():
        a, b = (tmp_path / run / f"retention-{name}.png" for run in "ab")
        code, general = theme.capabilities["code"], theme.capabilities["general"]
        assert width(b, code) == pytest.approx(2 * width(a, code), rel=0.03)
        assert width(b, general) == pytest.approx(3 * width(a, code), rel=0.03)
        line = np.flatnonzero(pixels(b, theme.ink)[150:].sum(axis=0) > 150)  # dashed, all the way down
        start = np.flatnonzero(pixels(b, general).sum(axis=0) > 15).min()
        assert line.mean() - start == pytest.approx(width(b, general) / 0.75, rel=0.02)
        assert (pixels(b, theme.paper).mean()) > 0.6


def test_every_number_and_every_reason_stands_in_the_svg(tmp_path: Path) -> None:
    drawn = pictures.draw(tmp_path, "a model at 60%", report(0.5), {"dense": scores(0.8), "sparse": scores(0.3)})
    assert sorted(path.name for path in drawn) == [
        f"{name}-{theme}.{kind}" for name in ("retention", "tasks") for theme in ("dark", "light") for kind in ("png", "svg")
    ]  # fmt: skip
    texts = {}
    for path in drawn:
        if path.suffix == ".svg":
            root = ElementTree.parse(path).getroot()
            assert root.tag.endswith("svg")
            texts[path.stem] = path.read_text()
    for text in ("a model at 60%", "50.0", "40.0 to 60.0", "undefined: dense is at chance", "not measured", "total"):
        assert text in texts["retention-light"] and text in texts["retention-dark"], text
    assert "hellaswag" not in texts["retention-light"], "a missing task is no capability"
    for text in ("some_code", "mmlu", "80.0", "30.0"):
        assert text in texts["tasks-light"], text


def test_a_dot_lies_where_its_score_is(tmp_path: Path) -> None:
    places = []
    for value in (0.2, 0.4, 0.8):
        pictures.draw(tmp_path / str(value), "m", report(0.5), {"dense": scores(0.9), "sparse": scores(value)})
        found = pixels(tmp_path / str(value) / "tasks-light.png", plots.COLOURS["code"])
        places.append(np.flatnonzero(found.sum(axis=0) > 5).min())
    assert places[2] - places[1] == pytest.approx(2 * (places[1] - places[0]), rel=0.03)


def test_a_model_at_chance_has_a_picture_that_says_so(tmp_path: Path) -> None:
    at_chance = CapabilityReport(report(0.5).capabilities[2:], None, None, None, {})
    drawn = pictures.draw(tmp_path, "m", at_chance, {})
    assert len(drawn) == 4
    assert "undefined: dense is at chance" in drawn[0].read_text()


def test_a_dollar_in_a_name_is_a_dollar(tmp_path: Path) -> None:
    name = r"$\frac{a}{$_x^ \$me"
    items = tuple(replace(task, task=name) for task in scores(0.8).tasks)
    drawn = pictures.draw(tmp_path, name, report(0.5), dict.fromkeys(("dense", "sparse"), Scores(items)))
    assert len(drawn) == 8
    for path in drawn:
        if path.suffix == ".svg":
            assert path.read_text().count(name) >= 1 + ("tasks" in path.stem), "as it is written"


def test_a_picture_that_cannot_be_drawn_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object, **options: object) -> Path:
        raise ValueError("no font")

    monkeypatch.setattr(plots, "pairs", fail)  # after the first picture has been written
    measured = {"dense": scores(0.8), "sparse": scores(0.3)}
    calibration = CalibrationSet([[1, 2]], (CalibrationRow("c4", 0, "general"),))
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    hub.save_run(tmp_path / "run", lambda folder: None, tokenizer, example(), calibration, measured)
    assert "The figures could not be drawn and are left out: ValueError: no font" in caplog.text
    assert not (tmp_path / "run" / "figures").exists()
    assert "![" not in (tmp_path / "run" / "README.md").read_text()
    assert hub.load_scores(tmp_path / "run") == measured


def test_nothing_measured_is_nothing_drawn(tmp_path: Path) -> None:
    empty = CapabilityReport((), None, None, None, {"code": "no data"})
    assert pictures.draw(tmp_path, "m", empty, {}) == []
    assert list(tmp_path.iterdir()) == []


def test_the_same_numbers_make_the_same_bytes(tmp_path: Path) -> None:
    runs = [pictures.draw(tmp_path / run, "m", report(0.5), {}) for run in "ab"]
    assert [path.read_bytes() for path in runs[0]] == [path.read_bytes() for path in runs[1]]


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", plots.THEMES.values(), ids=plots.THEMES)
def test_colours_stand_out_from_the_page(theme: plots.Theme) -> None:
    """WCAG 2: 4.5 for text, 3 for graphics."""
    assert all(contrast(text, theme.paper) >= 4.5 for text in (theme.ink, theme.note))
    assert all(contrast(colour, theme.paper) >= 3 for colour in (*theme.capabilities.values(), theme.faint))


# Linear RGB as seen without long- or medium-wave cones (Machado, Oliveira and Fernandes 2009, severity 1): about 1 man in 50.
VISION = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", plots.THEMES.values(), ids=plots.THEMES)
def test_capabilities_are_told_apart_without_red_or_green(theme: plots.Theme, vision: str) -> None:
    """Every row carries its name, too, for those who see no difference at all."""

    def seen(colour: str) -> np.ndarray:
        linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)])
        return np.clip(np.array(VISION[vision]) @ linear, 0, 1) ** (1 / 2.2)

    for a, b in itertools.combinations(theme.capabilities.values(), 2):
        assert np.linalg.norm(seen(a) - seen(b)) > 0.1, (a, b)


def test_the_card_shows_the_light_pictures_that_are_there() -> None:
    run = example()
    text = render(
        run, pictures=["figures/retention-light.svg", "figures/retention-light.png", "figures/tasks-dark.png"]
    )
    assert "\n![what it keeps of each capability](figures/retention-light.png)\n" in text
    assert text.count("![") == 1
    assert "\n\n\n" not in text
    assert "![" not in render(replace(run, capabilities=None), pictures=["figures/retention-light.png"])
