# SPDX-License-Identifier: Apache-2.0
"""Scores are kept by task: for the same weights and questions only, and across a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_calibprune import pocket
from optimum_calibprune.capabilities import harness, store
from optimum_calibprune.capabilities import score as scoring
from optimum_calibprune.capabilities.benchmarks import BENCHMARKS, Benchmark
from optimum_calibprune.capabilities.engine import Engine
from optimum_calibprune.capabilities.sandbox import Isolation, Verdict
from optimum_calibprune.capabilities.score import measure
from optimum_calibprune.capabilities.tasks import Task, pocket_tasks
from optimum_calibprune.records import Scores


EVALUATE = """
from optimum_calibprune import CalibPruner
print(CalibPruner.from_pretrained("pocket").evaluate().to_json())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "kept"
    found.mkdir()
    monkeypatch.setattr(store, "place", lambda key: found / f"{key}.json")
    return found


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(pocket.MODEL, dtype="float32").eval()


def short(tmp_path: Path, count: int = 12) -> list[Task]:
    tasks = []
    for task in pocket_tasks(["commonsense", "math"]):
        path = tmp_path / task.path.name
        path.write_text("\n".join(task.path.read_text().splitlines()[:count]) + "\n")
        tasks.append(Task(**{**task.__dict__, "path": path}))
    return tasks


def kept(model: PreTrainedModel, tasks: list[Task | Benchmark], **options: Any) -> Scores:
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    return measure(model, tokenizer, tasks, identity=store.of_model(model, tokenizer), **options)


def test_the_same_model_is_asked_once_and_another_one_again(
    folder: Path, tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    first = kept(model, short(tmp_path))
    assert len(list(folder.iterdir())) == 2
    told: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "ask", lambda *_: pytest.fail("the model was asked again"))
        again = kept(model, short(tmp_path), on_progress=lambda done, total, text: told.append(text))
    assert again == first
    assert told == ["pocket_commonsense, from the cache", "pocket_math, from the cache"]

    asked: list[str] = []
    ask = scoring.ask
    monkeypatch.setattr(
        scoring, "ask", lambda engine, requests: asked.append(requests[0].task_name) or ask(engine, requests)
    )
    measure(model, tokenizer, short(tmp_path))  # without keeping
    kept(model, short(tmp_path, count=11))  # other items
    assert asked == ["pocket_commonsense", "pocket_math"] * 2
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = 0.0
    kept(model, short(tmp_path))  # other weights
    with torch.no_grad():
        weight[0, 0] = before
    kept(model, short(tmp_path))
    assert asked == ["pocket_commonsense", "pocket_math"] * 3


def test_kept_scores_are_of_the_capability_and_file_that_were_asked_for(
    folder: Path, tmp_path: Path, model: PreTrainedModel
) -> None:
    (task,) = (task for task in short(tmp_path) if task.name == "pocket_math")
    first = kept(model, [task]).tasks[0]
    other = replace(task, capability="general", path=task.path.rename(tmp_path / "other.jsonl"))
    second = kept(model, [other]).tasks[0]
    assert len(list(folder.iterdir())) == 1
    assert second == replace(first, capability="general", data="other.jsonl")


def test_scores_in_which_a_program_ran_out_of_time_are_not_kept(
    folder: Path, tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (probes,) = pocket_tasks(["code"])
    probes = replace(probes, path=tmp_path / "code.jsonl")
    probes.path.write_text("".join(line + "\n" for line in pocket.probes()["code"].read_text().splitlines()[:2]))
    row = {"task_id": 1, "text": "Return one.", "code": "", "test_list": ["assert one() == 1"] * 3}
    (tmp_path / "mbpp.jsonl").write_text(f"{json.dumps(row)}\n")
    tasks = [probes, replace(BENCHMARKS["mbpp"], data=tmp_path)]
    monkeypatch.setattr(scoring, "isolation", lambda: Isolation(available=True))
    for reason, count in (("timed out", 0), ("AssertionError", 2)):
        for module in (scoring, harness):
            monkeypatch.setattr(
                module, "check_programs", lambda programs, why=reason: [Verdict(False, why, 1.0)] * len(programs)
            )
        assert len(kept(model, tasks).tasks) == 2
        assert len(list(folder.iterdir())) == count


def test_what_ends_a_text_is_part_of_the_identity(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    first = store.of_model(model, tokenizer)
    assert store.of_model(model, tokenizer) == first
    monkeypatch.setattr(model.generation_config, "eos_token_id", [5, 6])
    assert store.of_model(model, tokenizer) != first


def test_damaged_scores_are_measured_anew(
    folder: Path, tmp_path: Path, model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    first = kept(model, short(tmp_path))
    for path in folder.iterdir():
        path.write_text(path.read_text()[:100])
    assert kept(model, short(tmp_path)) == first
    assert "damaged" in caplog.text


def test_a_task_that_fails_leaves_the_finished_ones(
    folder: Path, tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("Out of GPU memory with a single text")

    monkeypatch.setattr(Engine, "generate_until", fail)
    with pytest.raises(MemoryError):
        kept(model, short(tmp_path))
    assert len(list(folder.iterdir())) == 1


def test_an_evaluation_that_was_killed_goes_on_after_the_finished_tasks(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[str]:
        words = [sys.executable, "-c", EVALUATE]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HOME": str(tmp_path)})

    def kept() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("assets/*/scores/default/*.json")}

    killed = start()
    while not kept():
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    finished = kept()
    assert 1 <= len(finished) < 4

    second = start()
    scores = Scores.from_json(second.communicate()[0])
    assert second.returncode == 0
    assert {task.task: len(task.item_scores) for task in scores.tasks} == dict.fromkeys(
        ["pocket_general", "pocket_commonsense", "pocket_code", "pocket_math"], 400
    )
    assert {name: kept()[name] for name in finished} == finished, "the finished tasks were not measured again"
    assert len(kept()) == 4
