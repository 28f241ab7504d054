# SPDX-License-Identifier: Apache-2.0
"""Our metric, loaded by `evaluate` from its folder as a user loads it; its examples; metrics of others."""

from __future__ import annotations

import doctest
import inspect
import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
import yaml
from evaluate import EvaluationModule

from optimum_calibprune.capabilities.metrics import item_scores
from optimum_calibprune.capabilities.retention import capability_report
from optimum_calibprune.records import Scores, TaskScore


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "metrics" / "capability_retention"


@pytest.fixture(scope="module")
def metric() -> EvaluationModule:
    return evaluate.load(str(FOLDER))


def test_it_returns_what_the_card_reports(metric: EvaluationModule) -> None:
    generator = np.random.default_rng(0)
    dense, sparse = (generator.random((2, 300)) < [[0.8], [0.6]]).astype(float)
    tasks = ["a"] * 100 + ["b"] * 200
    found = metric.compute(
        predictions=sparse, references=dense, tasks=tasks, capabilities={"a": "code", "b": "math"}, chance={"b": 0.25}
    )
    report = capability_report(*(
        Scores((TaskScore("a", "code", "", 0.0, tuple(row[:100])), TaskScore("b", "math", "", 0.25, tuple(row[100:]))))
        for row in (dense, sparse)
    ))  # fmt: skip
    assert found["total"] == report.total
    assert found["worst"] == report.worst
    assert found["measured"] == ["code", "math"]
    for entry in report.capabilities:
        kept = found["capabilities"][entry.capability]
        assert (kept["retention"], tuple(kept["interval"])) == (entry.retention, entry.interval)
        assert kept["above_chance"] == entry.above_chance
    json.dumps(found, allow_nan=False)  # plain numbers, as cards and files need them


def test_items_may_come_in_batches(metric: EvaluationModule) -> None:
    metric.add_batch(predictions=[1, 0] * 10 + [1] * 9, references=[1] * 29)
    metric.add(prediction=1, reference=1)
    assert metric.compute()["total"] == pytest.approx(20 / 30)


def test_at_chance_nothing_is_defined(metric: EvaluationModule) -> None:
    found = metric.compute(predictions=[1, 0] * 9, references=[0, 1] * 9, chance={"task": 0.5})
    assert found["total"] is found["worst"] is found["capabilities"]["general"]["retention"] is None
    assert found["measured"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["a"]}, "2 items but 1 names of tasks"),
        ({"capabilities": {"task": "poetry"}}, "'poetry', given for 'task', is none of general, commonsense"),
        ({"chance": {"tsak": 0.5}}, "There is no item of task 'tsak'; the tasks are task"),
        ({"references": [1, 2]}, "Scores are 0 to 1; 2 was given"),
    ],
)
def test_bad_input_is_refused_with_one_sentence(metric: EvaluationModule, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric.compute(**({"predictions": [1, 0], "references": [1, 1]} | options))


def examples(text: str, metric: EvaluationModule, monkeypatch: pytest.MonkeyPatch) -> doctest.TestResults:
    monkeypatch.chdir(ROOT)  # the examples name the folder as it lies in the repository
    test = doctest.DocTestParser().get_doctest(text, {"evaluate": evaluate}, "examples", None, 0)
    return doctest.DocTestRunner().run(test)


def test_the_examples_of_the_docstring_are_true(metric: EvaluationModule, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examples(inspect.getdoc(type(metric)), metric, monkeypatch)
    assert (found.failed, found.attempted) == (0, 9)


def test_the_examples_of_the_readme_are_true(metric: EvaluationModule, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examples((FOLDER / "README.md").read_text(), metric, monkeypatch)
    assert (found.failed, found.attempted) == (0, 7)


def test_the_folder_is_what_the_hub_takes_for_a_metric() -> None:
    assert sorted(path.name for path in FOLDER.iterdir() if path.is_file()) == [
        "README.md",
        "capability_retention.py",
        "requirements.txt",
    ]
    front = yaml.safe_load((FOLDER / "README.md").read_text().split("---")[1])
    assert {"evaluate", "metric"} <= set(front["tags"])
    assert front["sdk"] == "static"


# -------------------------------------------------------------------------------------- metrics of others

EXACT = """
import datasets
import evaluate
class Exact(evaluate.Metric):
    def _info(self):
        columns = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(columns))
    def _compute(self, predictions, references):
        import numpy
        return {"exact": numpy.mean([a == b for a, b in zip(predictions, references)]), "note": "text"}
"""


def test_a_metric_of_evaluate_scores_every_item(tmp_path: Path) -> None:
    (tmp_path / "exact").mkdir()
    (tmp_path / "exact" / "exact.py").write_text(EXACT)
    exact = evaluate.load(str(tmp_path / "exact"))
    found = item_scores(exact, ["a", "b", "c"], ["a", "x", "c"])
    assert found == (1.0, 0.0, 1.0)
    assert all(type(value) is float for value in found)


def test_any_callable_scores_every_item() -> None:
    def overlap(predictions: list[str], references: list[str]) -> float:
        return len({*predictions[0]} & {*references[0]}) / len({*predictions[0]} | {*references[0]})

    assert item_scores(overlap, ["ab", "cd"], ["ab", "ce"]) == (1.0, pytest.approx(1 / 3))
    both = lambda predictions, references: {"f1": np.float64(0.5), "recall": 1}  # noqa: E731
    assert item_scores(both, ["a"], ["b"], name="f1") == (0.5,)


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        (lambda p, r: {"f1": 0.5, "recall": 1}, {}, "returns f1, recall; say which of them counts"),
        (lambda p, r: {"f1": 0.5}, {"name": "recall"}, "returns no number 'recall', but f1"),
        (lambda p, r: {}, {}, "returns nothing; say which"),
        (lambda p, r: 7, {}, "returns 7 for one item; a score is a number from 0 to 1"),
        (lambda p, r: float("nan"), {}, "returns nan for one item"),
        (lambda p, r: "right", {}, "returns 'right' for one item"),
    ],
)
def test_what_is_no_score_of_an_item_is_refused(metric: object, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        item_scores(metric, ["a"], ["b"], **options)
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        item_scores(metric, ["a"], ["b", "c"])
