# SPDX-License-Identifier: Apache-2.0
"""The published study: its numbers follow from its cells, and its page says what they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from optimum_calibprune.records import CAPABILITIES
from optimum_calibprune.study import report
from optimum_calibprune.study.store import StudyFolder


DOCS = Path(__file__).parents[2] / "docs"
FOLDER = StudyFolder(DOCS / "study")


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return json.loads((FOLDER.path / report.JSON_NAME).read_text(encoding="utf-8"))


def test_every_mean_follows_from_the_items_of_its_cells(data: dict[str, Any]) -> None:
    dense = FOLDER.dense()
    found = {(str(r.cell.mix), r.cell.sources, str(r.cell.pattern), r.cell.seed): r for r in FOLDER.results(dense)}
    assert len(found) == len(data["cells"])
    kept = {task.capability: task.value for task in dense.scores().tasks}
    for row in data["mixes"]:
        mine = [
            result
            for (mix, sources, pattern, seed), result in found.items()
            if row["mix"].partition("@")[0] == mix
            and (sorted(sources), pattern) == (sorted(row["sources"]), row["pattern"])
            and seed in row["seeds"]
        ]
        assert len(mine) == len(row["seeds"]), row["mix"]
        for name, entry in row["retention"].items():
            values = [
                task.value for result in mine for task in result.sparse.scores().tasks if task.capability == name
            ]
            assert entry["value"] == pytest.approx(sum(values) / len(values) / kept[name]), row["mix"]


def test_the_page_shows_the_table_of_the_report_and_every_figure_it_names(data: dict[str, Any]) -> None:
    page = (DOCS / "study.md").read_text(encoding="utf-8")
    written = (FOLDER.path / report.REPORT_NAME).read_text(encoding="utf-8")
    assert all(part in written for part in report.render(data).split("\n\n"))
    assert written.partition("## At 50%\n\n")[2].partition("\n\n")[0] in page
    for line in page.splitlines():
        if line.startswith("!["):
            assert (DOCS / line.partition("](")[2].rstrip(")")).is_file(), line


def test_every_total_and_difference_in_prose_stands_in_the_json(data: dict[str, Any]) -> None:
    known = {_spread("", row["total"], row["total_interval"]) for row in data["mixes"]}
    known |= {_spread("+", row["difference"], row["interval"]) for row in data["comparisons"]}
    pages = {name: (DOCS / name).read_text(encoding="utf-8") for name in ("study.md", "../README.md", "log.md")}
    pages["study.md"] = re.sub(r"^\|.*\n", "", pages["study.md"], flags=re.MULTILINE)  # tables have tests of their own
    pages["log.md"] = pages["log.md"].partition("### Which mix is the default")[2].partition("###")[0]
    for name, page in pages.items():
        found = re.findall(r"[+-]?\d+\.\d \([+-]?\d+\.\d to [+-]?\d+\.\d\)", page.replace("*", ""))
        assert len(found) > 5, name
        assert set(found) <= known, name


def test_every_row_of_the_readme_stands_in_the_json(data: dict[str, Any]) -> None:
    known = {
        tuple(f"{100 * value:.1f}" for value in (*(r["retention"][c]["value"] for c in CAPABILITIES), r["total"]))
        for r in data["mixes"]
        if r["pattern"] == "50%"
    }
    measured = (DOCS.parent / "README.md").read_text(encoding="utf-8").partition("## Measured")[2].partition("##")[0]
    rows = [re.findall(r"\d+\.\d", line.partition("| ")[2].partition("|")[2])[:5] for line in measured.splitlines()]
    rows = [tuple(row) for row in rows if len(row) == 5]
    assert len(rows) > 10
    assert set(rows) <= known


def _spread(sign: str, value: float, interval: list[float]) -> str:
    middle, low, high = (f"{100 * number:{sign}.1f}" for number in (value, *interval))
    return f"{middle} ({low} to {high})"
