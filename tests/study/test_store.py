# SPDX-License-Identifier: Apache-2.0
"""A study's folder: whole files or none, damaged ones named, other settings refused with what differs."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from optimum_calibprune.study.store import StudyFolder, differences, write_whole
from tests.study import made_study


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    made = StudyFolder(tmp_path / "study")
    made.check()
    made.claim(made_study.settings())
    made.write_dense(made_study.dense(items=20))
    return made


def test_results_come_back_as_they_were_written(folder: StudyFolder) -> None:
    dense = made_study.dense(items=20)
    results = [made_study.result(mix, seed=seed, items=20) for seed in (1, 0) for mix in ("uniform", "single:c4")]
    for result in results:
        folder.write(result)
    assert folder.dense() == dense
    assert folder.result(results[0].cell, dense) == results[0]
    assert folder.result(made_study.result("igsp").cell, dense) is None
    assert {r.cell for r in folder.results(dense)} == {r.cell for r in results}
    assert [r.cell.seed for r in folder.results(dense)] == [0, 0, 1, 1]
    assert [path for path in folder.path.rglob("*") if path.name.startswith(".")] == []


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"schema_version": 1}', '{"schema_version": 9}'])
def test_a_damaged_cell_is_named_and_counts_as_not_run(
    folder: StudyFolder, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    result, dense = made_study.result("uniform", items=20), made_study.dense(items=20)
    folder.write(result)
    path = folder.path / "cells" / f"{result.cell.key}.json"
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert folder.result(result.cell, dense) is None
    assert f"{path} is damaged" in caplog.text


def test_half_a_cell_is_damaged_wherever_it_ends(folder: StudyFolder) -> None:
    result, dense = made_study.result("uniform", items=20), made_study.dense(items=20)
    folder.write(result)
    path = folder.path / "cells" / f"{result.cell.key}.json"
    whole = path.read_text()
    for end in range(0, len(whole) - 2, 97):
        path.write_text(whole[:end])
        assert folder.result(result.cell, dense) is None


def test_a_cell_of_other_items_or_under_another_name_is_not_taken(
    folder: StudyFolder, caplog: pytest.LogCaptureFixture
) -> None:
    result, dense = made_study.result("uniform", items=20), made_study.dense(items=20)
    folder.write(made_study.result("uniform", items=19))
    assert folder.result(result.cell, dense) is None
    assert "was not measured on the items of the dense model" in caplog.text
    folder.write(result)
    path = folder.path / "cells" / f"{result.cell.key}.json"
    path.rename(path.with_name("other.json"))
    assert folder.results(dense) == []
    assert "belongs to another cell" in caplog.text


def test_damaged_dense_scores_are_named_and_count_as_not_measured(
    folder: StudyFolder, caplog: pytest.LogCaptureFixture
) -> None:
    (folder.path / "dense.json").write_text("{}")
    assert folder.dense() is None
    assert "dense.json is damaged" in caplog.text


def test_the_same_settings_go_on_and_new_sources_are_added(folder: StudyFolder) -> None:
    more = replace(made_study.settings(), sources={"c4": "ef" * 32, "new": "01" * 32})
    found = folder.claim(more)
    assert set(found.sources) == {*made_study.SOURCES, "new"}
    assert folder.claim(made_study.settings()).sources == found.sources


def test_other_settings_are_refused_with_everything_that_differs(folder: StudyFolder) -> None:
    here = replace(
        made_study.settings(),
        weights="00" * 32,
        options={"samples": "32", "length": "256", "method": "sparsegpt"},
        versions={"torch": "2.14.0", "optimum-calibprune": "0.1.0"},
        sources={"c4": "99" * 32},
    )
    with pytest.raises(ValueError, match="other settings") as error:
        folder.claim(here)
    for phrase in (
        "weights: abababababab... there, 000000000000... here",
        "samples: 64 there, 32 here",
        "version of torch: 2.13.0 there, 2.14.0 here",
        "source c4: efefefefefef... there, 999999999999... here",
    ):
        assert phrase in str(error.value)
    assert "length" not in str(error.value)
    assert differences(made_study.settings(), made_study.settings()) == []


def test_settings_that_cannot_be_read_are_refused(folder: StudyFolder) -> None:
    (folder.path / "study.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read; restore it"):
        folder.claim(made_study.settings())


def test_nothing_but_a_study_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("text")
    with pytest.raises(NotADirectoryError, match="is a file"):
        StudyFolder(tmp_path / "mine").check()
    with pytest.raises(FileExistsError, match="holds no study"):
        StudyFolder(tmp_path).check()
    (tmp_path / "empty").mkdir()
    StudyFolder(tmp_path / "empty").check()
    StudyFolder(tmp_path / "new" / "study").check()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "mine"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_whole(path, "old")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
