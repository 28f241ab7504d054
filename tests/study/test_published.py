# SPDX-License-Identifier: Apache-2.0
"""The published study: its numbers follow from its cells, and its page says what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
    rows = [row for row in data["mixes"] if row["pattern"] == "50%"]
    table = report._mixes(rows, data["dense"]).partition("\n\n")[0]
    assert table in page
    for line in page.splitlines():
        if line.startswith("!["):
            assert (DOCS / line.partition("](")[2].rstrip(")")).is_file(), line
