# SPDX-License-Identifier: Apache-2.0
"""Scoring: right answers count, wrong ones do not, and lm-eval's numbers are those of the model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from optimum_calibprune import pocket
from optimum_calibprune.capabilities import sandbox
from optimum_calibprune.capabilities import score as scoring
from optimum_calibprune.capabilities.retention import capability_report
from optimum_calibprune.capabilities.sandbox import Isolation
from optimum_calibprune.capabilities.tasks import Task, pocket_tasks


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(pocket.MODEL)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(pocket.MODEL, dtype="float32").eval()


def write(path: Path, items: list[dict]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def short(task: Task, tmp_path: Path, count: int = 12) -> Task:
    lines = task.path.read_text().splitlines()[:count]
    return Task(
        **{**task.__dict__, "path": write(tmp_path / f"{task.name}.jsonl", [json.loads(line) for line in lines])}
    )


def test_multiple_choice_follows_the_mean_log_likelihood_a_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The decision of every item equals that of plain forward passes."""
    for task in pocket_tasks(["general", "commonsense"]):
        part = short(task, tmp_path)
        measured = scoring.measure(model, tokenizer, [part]).tasks[0].item_scores
        for item, right in zip(map(json.loads, part.path.read_text().splitlines()), measured, strict=True):
            means = [_mean_log_likelihood(model, tokenizer, item["prompt"], choice) for choice in item["choices"]]
            assert right == float(means.index(max(means)) == item["answer"])


def _mean_log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, choice: str
) -> float:
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + choice, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].log_softmax(dim=1)
    targets = ids[0, start:]
    return float(logits[start - 1 : -1].gather(1, targets[:, None]).mean())


def test_a_longer_choice_is_not_punished_for_its_length(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    items = [{"prompt": "A:", "choices": [" one", " one two three four five six"], "answer": 1}]
    prompt, first, second = (
        len(tokenizer(text)["input_ids"]) for text in ("A:", "A: one", "A:" + items[0]["choices"][1])
    )
    few, many = first - prompt, second - prompt
    assert many > 2 * few
    task = Task("t", "general", "multiple_choice", write(tmp_path / "t.jsonl", items))
    assert scoring.score(task, [[(-1.0 * few, False), (-0.9 * many, False)]], tokenizer) == (1.0,)
    assert scoring.score(task, [[(-1.0 * few, False), (-1.1 * many, False)]], tokenizer) == (0.0,)
    assert scoring.score(task, [[(0.0, False), (0.0, False)]], tokenizer) == (0.0,), "ties go to the first choice"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 21 + 8 = 29 #### 29", 1.0),
        ("#### 29 \nmore", 1.0),
        (" 29", 1.0),
        (" 21 + 8 = 28 #### 28", 0.0),
        ("\n#### 29", 0.0),
        (" #### 290", 0.0),
        ("", 0.0),
    ],
)
def test_exact_match_reads_the_first_line_after_the_marker(
    text: str, right: float, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / "t.jsonl", [{"prompt": "Question:", "target": "29"}])
    task = Task("t", "math", "exact_match", path, marker="####")
    assert scoring.score(task, [[text]], tokenizer) == (right,)


def test_code_passes_with_the_canonical_answers_and_fails_with_wrong_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    task = pocket_tasks(["code"])[0]
    items = [json.loads(line) for line in task.path.read_text().splitlines()[:60]]
    part = Task(**{**task.__dict__, "path": task.path})
    assert len({item["entry_point"] for item in items}) > 20
    good = scoring.score(
        part, [[item["target"]] for item in map(json.loads, task.path.read_text().splitlines())], tokenizer
    )
    assert set(good) == {1.0}
    bad = scoring.score(part, [["\n    return None\n"] for _ in range(400)], tokenizer)
    assert set(bad) == {0.0}


def test_code_is_not_run_and_not_measured_where_it_cannot_be_isolated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "check_programs", lambda programs: pytest.fail("generated code was run"))
    monkeypatch.setattr(sandbox, "_probe", lambda *, namespaces: Isolation(False, "not allowed"))
    sandbox.isolation.cache_clear()
    try:
        measured = scoring.measure(model, tokenizer, pocket_tasks(["code"]))
    finally:
        sandbox.isolation.cache_clear()
    assert measured.tasks == ()
    assert measured.not_measured["code"] == (
        "generated code cannot be isolated here: no namespaces (not allowed) and no spare user (not allowed) (pocket_code)"
    )


def test_generation_ends_where_the_task_says(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tasks = [short(task, tmp_path) for task in pocket_tasks(["code", "math"])]
    told: list[tuple[int, int, str]] = []
    scores = scoring.measure(model, tokenizer, tasks, on_progress=lambda *progress: told.append(progress))
    assert told[0] == (0, 12, "pocket_code")
    assert told[-1][:2] == (12, 12)
    assert re.fullmatch(r"pocket_math, \d+\.\d items/s", told[-1][2])
    assert {t.task: len(t.item_scores) for t in scores.tasks} == {"pocket_code": 12, "pocket_math": 12}
    assert all(t.value > 0.7 for t in scores.tasks)


def test_an_empty_task_is_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    task = Task("nothing", "math", "exact_match", write(tmp_path / "t.jsonl", []))
    with pytest.raises(ValueError, match="'nothing' has no items"):
        scoring.measure(model, tokenizer, [task])


def test_scores_of_metrics_that_share_a_name_are_told_apart(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def always() -> Callable[[list[str], list[str]], float]:
        def exact_match(predictions: list[str], references: list[str]) -> float:
            return 1.0

        return exact_match

    def never() -> Callable[[list[str], list[str]], float]:
        def exact_match(predictions: list[str], references: list[str]) -> float:
            return 0.0

        return exact_match

    (task,) = (short(task, tmp_path, 4) for task in pocket_tasks(["math"]))
    own, first, again, other = (
        scoring.measure(model, tokenizer, [task], metrics={} if metric is None else {task.name: metric})
        for metric in (None, always(), always(), never())
    )
    assert {scores.tasks[0].metric for scores in (own, first, again, other)} == {"exact_match"}
    assert first == again
    assert capability_report(first, again).total == 1
    for pair in ((own, first), (own, other), (first, other)):
        with pytest.raises(ValueError, match="was not measured on the same items in the same way"):
            capability_report(*pair)
