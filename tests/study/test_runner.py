# SPDX-License-Identifier: Apache-2.0
"""A study on the pocket, end to end: what it writes, and that it goes on after a kill, a damaged file, a failed cell."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from optimum_calibprune import pocket
from optimum_calibprune.study import runner
from optimum_calibprune.study.report import write_report
from optimum_calibprune.study.runner import Study


ITEMS = 12
MIXES = ["single:gsm8k", "uniform", "igsp@gsm8k,piqa"]


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probes")
    for capability, path in pocket.probes().items():
        lines = path.read_text(encoding="utf-8").splitlines()[:ITEMS]
        (folder / f"{capability}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def settings(probes: Path, **changes: Any) -> dict[str, Any]:
    return {
        "mixes": MIXES,
        "sources": ["gsm8k", "piqa", "textbooks"],
        "sparsity": ["50%"],
        "seeds": (0, 1),
        "probes": probes,
        "capabilities": ("general", "math"),
        "samples": 4,
        "length": 32,
    } | changes


def run(study: Study, **options: Any) -> dict[str, Any]:
    study.run(**options)
    return write_report(study.folder, study.settings)


@pytest.fixture(scope="module")
def finished(probes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("study") / "out"
    return folder, run(Study.open("pocket", folder, **settings(probes)))


def timeless(data: dict[str, Any]) -> dict[str, Any]:
    """Without what another run of the same cells need not repeat."""
    rows = {
        name: [{k: v for k, v in row.items() if k != "seconds"} for row in data[name]] for name in ("cells", "mixes")
    }
    return {**data, **rows}


def test_a_study_writes_every_cell_and_a_report(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, data = finished
    assert len(list((folder / "cells").glob("*.json"))) == len(data["cells"]) == 6
    assert {row["mix"] for row in data["mixes"]} == set(MIXES)
    assert json.loads((folder / "retention.json").read_text()) == json.loads(json.dumps(data))
    for row in data["mixes"]:
        assert row["seeds"] == [0, 1]
        assert set(row["retention"]) == {"general", "math"}
    names = {row["pattern"] for row in data["comparisons"]} | {row["as"] for row in data["comparisons"]}
    assert {"50%", "uniform"} <= names
    assert len((folder / "retention.csv").read_text().splitlines()) == 7
    report = (folder / "report.md").read_text()
    assert all(mix.split("@")[0].removeprefix("single:") in report for mix in MIXES)
    assert all(path.stat().st_size > 5000 for path in (folder / "figures").glob("*.png"))
    assert len(list((folder / "figures").glob("*.png"))) >= 2


def test_retention_follows_from_the_items_of_the_cells(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, data = finished
    dense = {t["task"]: t["items"].count("1") for t in json.loads((folder / "dense.json").read_text())["tasks"]}
    for path in (folder / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        kept = [t["items"].count("1") / dense[t["task"]] for t in cell["sparse"]["tasks"]]
        (row,) = [r for r in data["cells"] if r["fingerprint"] == cell["fingerprint"]]
        assert row["total"] == pytest.approx(sum(kept) / len(kept))


def test_a_finished_study_runs_nothing_again(
    finished: tuple[Path, dict[str, Any]], probes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = finished
    monkeypatch.setattr(runner, "run_cell", None)  # whoever runs one fails
    assert run(Study.open("pocket", folder, **settings(probes))) == data


def test_a_killed_study_goes_on_and_ends_as_if_it_had_not_been(
    finished: tuple[Path, dict[str, Any]], probes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    command = [Path(sys.executable).with_name("optimum-cli"), "calibprune", "study", "pocket", "--mixes", *MIXES]
    command += ["--sources", "gsm8k", "piqa", "textbooks", "--seeds", "2", "--probes", probes, "--output", folder]
    command += ["--capabilities", "general,math", "--samples", "4", "--length", "32"]
    with subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while len(list(folder.glob("cells/*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    assert 2 <= len(before) < 6
    cells = []
    monkeypatch.setattr(runner, "run_cell", lambda job, _run=runner.run_cell: cells.append(job.cell) or _run(job))
    data = run(Study.open("pocket", folder, **settings(probes)))
    assert len(cells) == 6 - len(before)
    assert all((folder / "cells" / name).stat().st_mtime_ns == stamp for name, stamp in before.items())
    assert timeless(data) == timeless(finished[1])


def test_several_workers_find_the_same(finished: tuple[Path, dict[str, Any]], probes: Path, tmp_path: Path) -> None:
    data = run(Study.open("pocket", tmp_path / "out", **settings(probes)), workers=2)
    assert timeless(data) == timeless(finished[1])


def test_a_damaged_cell_is_named_and_run_again(probes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = settings(probes, mixes=["uniform"], seeds=(0,))
    data = run(Study.open("pocket", tmp_path / "out", **few))
    (path,) = (tmp_path / "out" / "cells").glob("*.json")
    path.write_text(path.read_text()[:-100])
    with caplog.at_level(logging.WARNING):
        again = run(Study.open("pocket", tmp_path / "out", **few))
    assert path.name in caplog.text
    assert timeless(again) == timeless(data)


def test_a_folder_of_another_study_is_refused_with_what_differs(
    finished: tuple[Path, dict[str, Any]], probes: Path
) -> None:
    with pytest.raises(ValueError, match=r"samples: 4 there, 5 here"):
        Study.open("pocket", finished[0], **settings(probes, samples=5))
    with pytest.raises(ValueError, match=r"allocation: None there, owl here"):
        Study.open("pocket", finished[0], **settings(probes, allocation="owl"))
    with pytest.raises(ValueError, match=r"probes of pocket_math"):
        Study.open("pocket", finished[0], **(settings(probes) | {"probes": None}))


def test_a_cell_that_fails_stops_no_other_and_is_tried_again(probes: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "One day Tom was hungry."}\n')
    given = settings(
        probes, mixes=["single:short", "single:gsm8k"], seeds=(0,), sources=[f"short={short}:general", "gsm8k"]
    )
    study = Study.open("pocket", tmp_path / "out", **given)
    data = run(study)
    assert [row["mix"] for row in data["mixes"]] == ["single:gsm8k"]
    (failed,) = study.failed()
    assert "Source 'short' is too short" in failed.failed
    assert "too short" in (tmp_path / "out" / "report.md").read_text()
    ran = []
    study = Study.open("pocket", tmp_path / "out", **given)
    study.run(on_cell=lambda done, total, result: ran.append(str(result.cell.mix)))
    assert ran == ["single:short"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixes": ["unifrom"]}, "Did you mean 'uniform'"),
        ({"mixes": ["single:c4"]}, "c4"),
        ({"sparsity": ["150%"]}, "Sparsity must lie"),
        ({"seeds": ()}, "at least one seed"),
        ({"sources": ["gsm8q"]}, "gsm8k"),
        ({"capabilities": ("maths",)}, "math"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_runs(
    changes: dict[str, Any], message: str, probes: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Study.open("pocket", tmp_path / "out", **settings(probes, **changes))
    assert not (tmp_path / "out").exists()
