# SPDX-License-Identifier: Apache-2.0
"""Runs in threads: they stop when asked to, leave nothing behind, and belong to one visitor."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.publishing.run_record import example


sys.path.insert(0, str(Path(__file__).parents[2] / "space"))

import limits
import runs
import watch
import work
from limits import Job, checked
from visitors import Visitor, Visitors
from watch import sentence


QUICK = Job(samples=4, capabilities=("general",))


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    assert condition()


def test_a_run_ends_with_a_record_and_a_model_for_its_visitor_alone(tmp_path: Path) -> None:
    (tmp_path / "visitors" / "left-behind").mkdir(parents=True)
    visitors = Visitors(tmp_path / "visitors", tmp_path / "files")
    assert list(visitors.root.iterdir()) == []
    run = visitors.prune("one", QUICK)
    with pytest.raises(ValueError, match="You have a run going on"):
        visitors.prune("one", QUICK)
    while run.wait(1.0):
        pass
    assert run.error == ""
    assert run.record.prune.zeros / run.record.prune.weights == pytest.approx(0.5, abs=0.01)
    assert "42 linear layers" in run.plan_text
    assert visitors.result("one") is run
    assert {path.name for path in run.folder.iterdir()} == {"model"}
    assert [path.name for path in run.shelf.iterdir()] == ["pocket-50.zip"]
    for other in ("two", "", "../one", str(run.folder)):
        with pytest.raises(ValueError, match="no result yet in this session"):
            visitors.result(other)
        visitors.leave(other)
    assert run.folder.exists()
    visitors.leave("one")
    assert list(visitors.root.iterdir()) == list(visitors.files.iterdir()) == []


@pytest.mark.parametrize("mix", limits.mixes(limits.POCKET))
def test_each_mix_that_is_offered_has_a_plan_for_the_pocket(mix: str, tmp_path: Path) -> None:
    asked = checked(limits.POCKET, mix, [], QUICK.sparsity, QUICK.samples, QUICK.capabilities)
    text = runs.plan_of(asked, tmp_path)
    assert "42 linear layers" in text
    assert f"(`{mix}` of" in text


@pytest.mark.parametrize("mix", ["sgs", "mixcal", "balanced"])  # others run elsewhere in these tests
def test_mixes_of_other_kinds_run(mix: str, tmp_path: Path) -> None:
    run = Visitors(tmp_path / "visitors", tmp_path / "files").prune("one", replace(QUICK, mix=mix))
    while run.wait(1.0):
        pass
    assert run.error == ""
    assert run.record.config.mix.kind == mix


@pytest.mark.parametrize("stage", ["load", "read", "prune", "measure sparse"])
def test_a_run_stops_in_every_stage(stage: str, tmp_path: Path) -> None:
    visitors = Visitors(tmp_path / "visitors", tmp_path / "files")
    run = visitors.prune("one", QUICK)
    wait_until(lambda: watch.STAGES.index(run.stage) >= watch.STAGES.index(stage))
    assert visitors.stop("one")
    assert not run.wait(0)
    assert run.record is None
    assert run.error == watch.STOPPED
    assert list(visitors.root.iterdir()) == []
    assert not visitors.stop("one"), "there is none any more"


def test_a_run_that_is_declined_before_its_turn_does_not_begin(tmp_path: Path) -> None:
    visitors = Visitors(tmp_path / "visitors", tmp_path / "files")
    visitors.expect("one", runs.PruneRun)
    visitors.decline("one", runs.PruneRun)
    with pytest.raises(ValueError, match="was stopped"):
        visitors.prune("one", QUICK)
    visitors.expect("one", runs.PruneRun)
    visitors.prune("one", QUICK)
    visitors.decline("one", runs.PruneRun)
    assert list(visitors.root.iterdir()) == []


def test_a_result_is_kept_until_the_next_one_is_there(tmp_path: Path) -> None:
    visitors = Visitors(tmp_path / "visitors", tmp_path / "files")
    first = visitors.prune("one", QUICK)
    wait_until(lambda: first.finished)
    failed = visitors.prune("one", replace(QUICK, model="owner/none"))
    wait_until(lambda: failed.finished)
    assert failed.error
    assert visitors.result("one") is first
    assert first.folder.exists()
    second = visitors.prune("one", QUICK)
    wait_until(lambda: second.finished)
    assert visitors.result("one") is second
    assert [path.name for path in visitors.root.iterdir()] == [second.folder.name]
    assert [path.name for path in visitors.files.iterdir()] == [second.shelf.name]
    visitors.close()


def test_a_result_that_is_being_pushed_stays_until_that_ends(tmp_path: Path) -> None:
    visitors = Visitors(tmp_path / "visitors", tmp_path / "files")
    run = visitors.prune("one", QUICK)
    wait_until(lambda: run.finished)
    with run.in_use() as folder, run.in_use():
        visitors.leave("one")
        assert (folder / "model.safetensors").exists()
    assert list(visitors.root.iterdir()) == list(visitors.files.iterdir()) == []
    with pytest.raises(ValueError, match="no result yet in this session"), run.in_use():
        pass


def test_what_one_view_declines_is_none_of_another(tmp_path: Path) -> None:
    visitors = Visitors(tmp_path / "visitors", tmp_path / "files")
    run = visitors.prune("one", QUICK)
    visitors.decline("one", runs.CompareRun)
    assert not run.finished
    visitors.decline("one", runs.PruneRun)
    assert run.error == watch.STOPPED
    with pytest.raises(ValueError, match="was stopped"):
        visitors.compare("one", [QUICK])
    visitors.leave("one")


def test_what_waits_for_its_turn_does_not_begin_when_its_visitor_has_left(tmp_path: Path) -> None:
    visitors = Visitors(tmp_path / "visitors", tmp_path / "files")
    visitors.leave("one")
    with pytest.raises(ValueError, match="was stopped"):
        visitors.prune("one", QUICK)
    assert list(visitors.root.iterdir()) == []


def test_one_run_works_at_a_time_and_one_that_nobody_looks_at_ends(tmp_path: Path) -> None:
    visitors = Visitors(tmp_path / "visitors", tmp_path / "files")
    first, second = visitors.prune("one", QUICK), visitors.prune("two", QUICK)
    looks = first.looks(0.1)
    next(looks)
    wait_until(lambda: first.stage != "load")
    assert second.stage == "load"
    assert second.plan_text == ""
    looks.close()
    wait_until(lambda: first.finished)
    assert first.error == watch.STOPPED
    wait_until(lambda: second.finished)
    assert second.record is not None
    visitors.close()
    assert list(visitors.root.iterdir()) == []


def test_a_run_that_takes_too_long_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.Run, "limit", 0.01)
    visitors = Visitors(tmp_path / "visitors", tmp_path / "files")
    run = visitors.prune("one", QUICK)
    wait_until(lambda: run.finished)
    assert "longer than" in run.error
    assert list(visitors.root.iterdir()) == []


def test_a_run_that_does_not_look_at_the_clock_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(runs.Run, "limit", 0.01)
    monkeypatch.setattr(runs, "GRACE", 0.01)
    monkeypatch.setattr(runs.PruneRun, "perform", lambda run: released.wait(60))
    visitors = Visitors(tmp_path / "visitors", tmp_path / "files")
    run = visitors.prune("one", QUICK)
    wait_until(lambda: not run.wait(0.02))
    assert "longer than" in run.error
    assert list(visitors.root.iterdir()) == []
    visitors.prune("one", QUICK).stop(0.1)  # its visitor may go on
    released.set()


def test_a_comparison_measures_the_dense_model_once_and_keeps_records_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune, given = work.CalibPruner.prune, []

    def watched(pruner: Any, **options: Any) -> Any:
        given.append(options.get("dense_scores"))
        return prune(pruner, **options)

    monkeypatch.setattr(work.CalibPruner, "prune", watched)
    visitors = Visitors(tmp_path / "visitors", tmp_path / "files")
    jobs = [replace(QUICK, mix=mix) for mix in ("uniform", "single:gsm8k")]
    run = visitors.compare("one", jobs)
    with pytest.raises(ValueError, match="You have a run going on"):
        visitors.prune("one", QUICK)
    while run.wait(1.0):
        pass
    assert run.error == ""
    assert given[0] is None
    assert given[1].tasks
    assert [str(record.config.mix) for record in visitors.records("one")] == ["uniform", "single:gsm8k"]
    assert len({record.capabilities.capabilities[0].dense for record in run.records}) == 1
    assert visitors.records("two") == []
    assert list(visitors.root.iterdir()) == []
    with pytest.raises(ValueError, match="no result"):
        visitors.result("one")


def test_a_comparison_that_is_stopped_keeps_what_was_finished(tmp_path: Path) -> None:
    visitors = Visitors(tmp_path / "visitors", tmp_path / "files")
    run = visitors.compare("one", [replace(QUICK, mix=mix) for mix in ("uniform", "single:gsm8k", "cola")])
    wait_until(lambda: len(run.records) == 1)
    visitors.decline("one", runs.CompareRun)
    assert run.error == watch.STOPPED
    assert len(visitors.records("one")) == 1
    assert list(visitors.root.iterdir()) == []


def test_the_latest_records_are_kept_one_of_each_config() -> None:
    visitor, record = Visitor(), example()
    for samples in (1, 2, 3, 4, 5, 3):
        visitor.keep(replace(record, config=replace(record.config, samples=samples)))
    assert [kept.config.samples for kept in visitor.records] == [2, 4, 5, 3]


@pytest.mark.parametrize("limit", [("KEPT_SECONDS", -1), ("KEPT_RESULTS", 0)])
def test_old_results_go_when_somebody_else_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: tuple[str, int]
) -> None:
    visitors = Visitors(tmp_path / "visitors", tmp_path / "files")
    first = visitors.prune("one", QUICK)
    while first.wait(1.0):
        pass
    assert visitors.result("one") is first
    monkeypatch.setattr(f"visitors.{limit[0]}", limit[1])
    visitors.prune("two", QUICK)
    with pytest.raises(ValueError, match="no result"):
        visitors.result("one")
    assert not first.folder.exists()
    assert not first.shelf.exists()
    visitors.leave("two")


def test_errors_are_one_sentence_without_a_path(tmp_path: Path) -> None:
    error = OSError(f"cannot read {tmp_path}/model/config.json\nof https://hub/owner/name, a/b")
    assert sentence(error) == "cannot read (a file) of https://hub/owner/name, a/b"
    assert sentence(OSError(f"not pushed. {tmp_path} is complete; finish with: x"), tmp_path) == "not pushed."
    assert sentence(MemoryError()) == "MemoryError"
    assert len(sentence(ValueError("x" * 2**20))) <= 400
