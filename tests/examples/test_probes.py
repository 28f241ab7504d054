# SPDX-License-Identifier: Apache-2.0
"""Probe files: the same bytes from the same seed, distinct items, columns that the package reads."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import probes
import pytest
import score
import tasks

from optimum_calibprune import pocket
from optimum_calibprune.capabilities.tasks import read
from optimum_calibprune.records import CAPABILITIES


def _keys(capability: str, items: int, seed: int) -> list:
    return [item.key for item in probes.probes(capability, items, seed)]


def _write(folder: Path, *options: str) -> Path:
    probes.main(["--items", "60", "--output", str(folder), *options])
    return folder


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    first, again, other = (
        _write(tmp_path / name, "--seed", seed) for name, seed in [("a", "1"), ("b", "1"), ("c", "2")]
    )
    for capability in CAPABILITIES:
        file = f"{capability}.jsonl"
        assert (first / file).read_bytes() == (again / file).read_bytes()
        assert (first / file).read_bytes() != (other / file).read_bytes()


def test_the_package_reads_the_files_and_the_columns_are_those_of_its_own_probes(tmp_path: Path) -> None:
    for task in score.probe_tasks(_write(tmp_path)):
        rows = read(task)
        bundled = json.loads(pocket.probes()[task.capability].read_text().partition("\n")[0])
        assert [list(row) for row in rows] == [list(bundled)] * 60
        assert len({row["id"] for row in rows}) == 60


@pytest.mark.parametrize("capability", ["general", "commonsense", "math"])
def test_items_are_distinct_and_more_of_them_begin_with_the_same(capability: str) -> None:
    keys = _keys(capability, 2000, seed=5)
    assert len(set(keys)) == 2000
    assert _keys(capability, 300, seed=5) == keys[:300]


def _family_of_each_function() -> dict[str, str]:
    """Name of a function -> first name of its family."""
    found = {}
    for family in tasks.code.table("functions"):
        least, most = family.get("n", [0, 0])
        for name in family["names"]:
            found |= {name.replace("{n}", str(number)): family["names"][0] for number in range(least, most + 1)}
    return found


def test_functions_come_again_only_when_their_family_has_shown_all() -> None:
    family_of, shown = _family_of_each_function(), defaultdict(Counter)
    for item in probes.probes("code", 3000, seed=5):
        shown[family_of[item.probe["entry_point"]]][item.key] += 1
    assert len(shown) == 64
    for kind in tasks.KINDS["code"]:
        counts = shown[kind.name]
        assert set(counts.values()) <= {counts.total() // kind.distinct, counts.total() // kind.distinct + 1}
        assert len(counts) == min(kind.distinct, counts.total())


def test_two_seeds_share_few_items_where_there_are_many_and_many_where_there_are_few() -> None:
    shared = {name: len({*_keys(name, 2000, 1)} & {*_keys(name, 2000, 2)}) for name in tasks.KINDS}
    assert shared["commonsense"] < 100 and shared["math"] < 300 and shared["general"] < 600
    assert shared["code"] > 300, "962 functions are all there are"


def test_no_items_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        probes.main(["--items", "0", "--output", str(tmp_path)])
    assert "at least one item" in capsys.readouterr().err
