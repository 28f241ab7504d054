# SPDX-License-Identifier: Apache-2.0
"""The tables and the report of a study, from cells that were made up."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats

from optimum_calibprune.capabilities.retention import draws_report
from optimum_calibprune.publishing import plots
from optimum_calibprune.records import CAPABILITIES
from optimum_calibprune.study import figures, tables
from optimum_calibprune.study.cells import CellResult
from optimum_calibprune.study.report import render, write_report
from optimum_calibprune.study.store import StudyFolder
from tests.study import made_study


SINGLES = ["single:c4", "single:arc", "single:piqa", "single:mbpp", "single:gsm8k", "single:wikitext2"]
SEEDS = (0, 1)


def upper_bound(seed: int) -> CellResult:
    result = made_study.result("uniform", seed=seed, items=60)
    return replace(
        result, cell=replace(result.cell, sources=("pocket_code", "pocket_math")), upper_bound=("pocket_code",)
    )


@pytest.fixture(scope="module")
def results() -> list[CellResult]:
    made = [made_study.result(m, seed=s, items=60) for m in (*SINGLES, "uniform", "igsp", "self-cal") for s in SEEDS]
    made += [made_study.result(m, "60%", s, items=60) for m in ("single:c4", "uniform", "igsp") for s in SEEDS]
    failed = CellResult(made_study.result("sgs").cell, failed="the corpus is too short")
    return [*made, *(upper_bound(seed) for seed in SEEDS), failed]


@pytest.fixture(scope="module")
def data(results: list[CellResult]) -> dict:
    return tables.summarise(made_study.settings(), made_study.dense(items=60), results)


def row(data: dict, mix: str, pattern: str = "50%") -> dict:
    return next(r for r in data["mixes"] if (r["mix"], r["pattern"]) == (mix, pattern))


def test_a_row_is_the_report_over_its_draws(data: dict, results: list[CellResult]) -> None:
    draws = [r.sparse.scores() for r in results if str(r.cell) in [f"igsp at 50%, seed {seed}" for seed in SEEDS]]
    report = draws_report(made_study.dense(items=60).scores(), draws)
    found = row(data, "igsp")
    assert found["seeds"] == list(SEEDS)
    assert found["total"] == report.total
    assert found["total_interval"] == list(report.total_interval)
    assert {name: kept["value"] for name, kept in found["retention"].items()} == {
        entry.capability: entry.retention for entry in report.capabilities
    }


def test_there_is_one_row_a_cell_and_one_a_mix_and_pattern(data: dict) -> None:
    assert len(data["cells"]) == 2 * (9 + 3 + 1)
    assert len(data["mixes"]) == 9 + 3 + 1
    cell = next(c for c in data["cells"] if (c["mix"], c["seed"], c["pattern"]) == ("uniform", 1, "60%"))
    assert cell["total"] == pytest.approx(sum(cell["retention"].values()) / 4)
    assert data["failed"] == [{"cell": "sgs at 50%, seed 0", "why": "the corpus is too short"}]
    json.dumps(data, allow_nan=False)


def test_a_mix_of_other_sources_has_a_name_of_its_own(data: dict) -> None:
    bound = row(data, "uniform@pocket_code,pocket_math")
    assert bound["upper_bound"] == ["pocket_code"]
    assert figures.label(bound) == "uniform of pocket_code + 1 more †"
    assert figures.label(row(data, "single:c4")) == "c4"
    assert row(data, "single:c4")["capability"] == "general"
    assert row(data, "uniform")["capability"] == ""


def test_correlations_are_over_the_single_sources_of_one_pattern(data: dict) -> None:
    rows = [row(data, mix) for mix in SINGLES]
    for outcome in ("code", "math"):
        found = next(
            r
            for r in data["correlations"]
            if (r["pattern"], r["metric"], r["outcome"]) == ("50%", "perplexity", outcome)
        )
        pairs = [(r["metrics"]["perplexity"], r["retention"][outcome]["value"]) for r in rows]
        expected = scipy.stats.spearmanr(*zip(*pairs, strict=True))
        assert found["rho"] == pytest.approx(expected.statistic)
        assert found["points"] == 6
        assert 0 < found["p_value"] <= 1
    at_60 = [r for r in data["correlations"] if r["pattern"] == "60%"]
    assert all(r["rho"] is None for r in at_60)


def test_the_comparisons_are_those_that_are_asked_for(data: dict) -> None:
    found = {(r["pattern"], r["first"], r["second"]): r for r in data["comparisons"]}
    best = max((row(data, mix) for mix in SINGLES), key=lambda r: r["total"])["mix"]
    at_50 = {(first, second) for pattern, first, second in found if pattern == "50%"}
    assert at_50 == {
        *(("igsp", other) for other in ("self-cal", "uniform", best, "single:c4")),
        *(("uniform", other) for other in (best, "single:c4")),
    }
    difference = found["50%", "igsp", "uniform"]
    assert difference["difference"] == pytest.approx(row(data, "igsp")["total"] - row(data, "uniform")["total"])
    assert difference["interval"][0] < difference["difference"] < difference["interval"][1]
    assert difference["seeds"] == list(SEEDS)
    assert ("60%", "uniform", "single:c4") in found


def test_draws_are_compared_over_the_seeds_that_both_have() -> None:
    made = [made_study.result("uniform", seed=s, items=40) for s in (0, 1, 2)]
    made += [made_study.result("igsp", seed=s, items=40) for s in (1, 2, 3)]
    data = tables.summarise(made_study.settings(), made_study.dense(items=40), made)
    assert [r["seeds"] for r in data["comparisons"]] == [[1, 2]]
    kept = {(r["mix"], r["seed"]): r["total"] for r in data["cells"]}
    expected = (kept["igsp", 1] + kept["igsp", 2] - kept["uniform", 1] - kept["uniform", 2]) / 2
    assert data["comparisons"][0]["difference"] == pytest.approx(expected)


def test_csv_has_a_line_a_cell_and_a_line_a_mix_with_the_same_numbers(data: dict) -> None:
    cells = list(csv.DictReader(io.StringIO(tables.cells_csv(data))))
    assert len(cells) == len(data["cells"])
    for line, found in zip(cells, data["cells"], strict=True):
        assert (line["mix"], int(line["seed"])) == (found["mix"], found["seed"])
        assert float(line["math"]) == found["retention"]["math"]
        assert float(line["perplexity"]) == found["metrics"]["perplexity"]
        assert line["sparse_perplexity"] == ""
    mixes = list(csv.DictReader(io.StringIO(tables.mixes_csv(data))))
    for line, found in zip(mixes, data["mixes"], strict=True):
        assert float(line["total"]) == found["total"]
        assert [float(line["code_low"]), float(line["code_high"])] == found["retention"]["code"]["interval"]


def test_the_report_says_what_the_numbers_say(data: dict) -> None:
    text = render(data, [("totals.png", "Totals.")])
    found = row(data, "igsp")
    low, high = found["total_interval"]
    assert f"**{100 * found['total']:.1f} ({100 * low:.1f} to {100 * high:.1f})**" in text
    order = [line.split(" | ")[0] for line in text.split("## At 60%")[0].splitlines() if line.startswith("| ")][1:]
    totals = {f"| {figures.label(r)}": r["total"] for r in data["mixes"] if r["pattern"] == "50%"}
    assert order == sorted(totals, key=lambda name: -totals[name])
    assert "| 50% | igsp | uniform | 2 | +" in text
    assert "(best single)" in text
    assert "† upper bound: text from the generator of the probes" in text
    assert "- sgs at 50%, seed 0: the corpus is too short" in text
    assert "![Totals.](figures/totals.png)" in text
    assert "torch 2.13.0" in text
    assert "26 cells" in text


def test_where_no_capability_was_measured_the_tables_show_perplexity() -> None:
    bare = {"tasks": (), "not_measured": dict.fromkeys(CAPABILITIES, "no suite")}
    made = [made_study.result(mix, seed=s, text="WikiText-2") for mix in ("single:c4", "uniform") for s in (0, 1)]
    made = [replace(r, sparse=replace(r.sparse, **bare)) for r in made]
    dense = replace(made_study.dense(text="WikiText-2"), **bare)
    data = tables.summarise(made_study.settings(), dense, made)
    assert data["comparisons"] == []
    assert [r["total"] for r in data["mixes"]] == [None, None]
    text = render(data)
    mean = row(data, "uniform")["perplexity"]["mean"]
    assert f"{mean:.2f} (" in text
    assert "- general: not measured (no suite)" in text
    assert "dense perplexity on WikiText-2" in text


def test_a_study_in_which_everything_failed_has_a_report(tmp_path: Path) -> None:
    failed = CellResult(made_study.result("sgs").cell, failed="no text")
    data = tables.summarise(made_study.settings(), made_study.dense(), [failed])
    assert "- sgs at 50%, seed 0: no text" in render(data, figures.draw(data, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_figures_are_drawn_for_every_pattern_and_for_the_curve(data: dict, tmp_path: Path) -> None:
    drawn = figures.draw(data, tmp_path)
    assert [name for name, _ in drawn] == [
        *("retention-50.png", "totals-50.png", "correlations-50.png"),
        *("retention-60.png", "totals-60.png", "sparsity.png"),
    ]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name, _ in drawn)


def test_without_matplotlib_everything_but_the_figures_is_written(
    tmp_path: Path, results: list[CellResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    folder = StudyFolder(tmp_path / "study")
    settings = folder.claim(made_study.settings())
    with pytest.raises(ValueError, match="no dense scores yet"):
        write_report(folder, settings)
    folder.write_dense(made_study.dense(items=60))
    for result in results:
        folder.write(result)
    data = write_report(folder, settings)
    names = {path.name for path in folder.path.iterdir()}
    assert {"retention.json", "retention.csv", "mixes.csv", "report.md"} <= names
    assert "figures" not in names
    assert "## Figures" not in (folder.path / "report.md").read_text()
    assert json.loads((folder.path / "retention.json").read_text()) == data
    assert render(data) == (folder.path / "report.md").read_text()
