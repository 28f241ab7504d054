# SPDX-License-Identifier: Apache-2.0
"""Benchmarks are lm-eval's own tasks, also on local files; what cannot be had or asked is a sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_calibprune import pocket
from optimum_calibprune.capabilities import score as scoring
from optimum_calibprune.capabilities.benchmarks import BENCHMARKS, Benchmark, find
from optimum_calibprune.capabilities.harness import _config, _files, load
from optimum_calibprune.capabilities.score import measure, prepare


MINE = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
ITEMS = [{"question": f"{i} + {i}?", "choices": [str(2 * i), str(2 * i + 1)], "right": i % 2} for i in range(10)]
ROWS = {  # as on the Hub, or with the columns of another collection; and the request that an item makes
    "arc_easy": [
        {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        {"query": "Question: Why?\nAnswer:", "choices": ["a", "b"], "gold": 1},
    ],
    "commonsense_qa": [
        {"question": "Why?", "choices": {"text": list("vwxyz"), "label": list("ABCDE")}, "answerKey": "B"},
        {"query": "Question: Why?\nAnswer:", "choices": list("vwxyz"), "gold": 1},
    ],
    "hellaswag": [
        {"activity_label": "Run", "ctx_a": "He", "ctx_b": "", "endings": ["a.", "b."], "label": "1"},
        {"query": "Run: He", "choices": ["a.", "b."], "gold": 1},
    ],
    "mbpp": [
        {"task_id": 9, "text": "Add.", "code": "x = 1", "test_list": ["assert x", "assert 1", "assert 2"]},
        {"task_id": 9, "prompt": "Add.", "code": "x = 1", "test": ["assert x", "assert 1", "assert 2"]},
    ],
    "sciq": [
        {
            "support": "",
            "question": "Why?",
            "distractor1": "a",
            "distractor2": "b",
            "distractor3": "c",
            "correct_answer": "d",
        }
    ],
    "boolq": [{"passage": "It is.", "question": "is it", "label": 1}],
    "piqa": [{"goal": "Sit", "sol1": "a", "sol2": "b", "label": 1}],
    "winogrande": [{"sentence": "Tom saw _ run.", "option1": "Al", "option2": "Bo", "answer": "2"}],
}
PROMPTS = {
    "arc_easy": ("Question: Why?\nAnswer:", " b"),
    "commonsense_qa": ("Question: Why?\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:", " B"),
    "hellaswag": ("Run: He", " b."),
    "sciq": ("\nQuestion: Why?\nAnswer:", " d"),
    "boolq": ("It is.\nQuestion: is it?\nAnswer:", " yes"),
    "piqa": ("Question: Sit\nAnswer:", " b"),
    "winogrande": ("Tom saw Bo", " run."),
}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mine(tmp_path: Path, metric: str = "acc", capability: str = ":math") -> str:
    data = write(tmp_path / "mine.jsonl", ITEMS)
    (tmp_path / "mine.yaml").write_text(MINE.format(path=data, metric=metric))
    return f"{tmp_path / 'mine.yaml'}{capability}"


@pytest.mark.parametrize(("name", "row"), [(name, i) for name, rows in ROWS.items() for i in range(len(rows))])
def test_local_rows_are_asked_as_rows_of_the_hub_would_be(name: str, row: int, tmp_path: Path) -> None:
    write(tmp_path / f"{name}_test.jsonl", [ROWS[name][row]])
    task = load(replace(BENCHMARKS[name], data=tmp_path))
    requests = [request.args for request in task.requests()]
    if name == "mbpp":
        prompt = requests[0][0]
        assert prompt.count("[BEGIN]") == 4, "three examples of lm-eval's, and the item"
        assert prompt.endswith(
            "here is your task: Add. Your code should pass these tests:\n\nassert x\nassert 1\nassert 2\n[BEGIN]\n"
        )
        return
    assert requests[1 if name != "sciq" else 3] == PROMPTS[name]
    answers = [(-2.0, False)] * len(requests)
    answers[requests.index(PROMPTS[name])] = (-1.0, False)
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    assert task.scores(answers, tokenizer)[1] == (1.0,)
    assert task.scores([(-2.0, False), *[(-3.0, False)] * (len(answers) - 1)], tokenizer)[1] == (0.0,)
    assert (
        task.chance() == pytest.approx(BENCHMARKS[name].chance if name != "arc_easy" else 0.5) or name == "hellaswag"
    )


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "mmlu"])
def test_the_table_says_what_lm_evals_files_say(name: str) -> None:
    benchmark = BENCHMARKS[name]
    try:
        config = _config(_files(benchmark.config)[0], replace(benchmark, shots=None))
    except ModuleNotFoundError:
        pytest.skip("lm-eval's file needs its packages for mathematics")
    assert config["task"] == name
    assert config["dataset_path"] == benchmark.repo
    assert config.get("num_fewshot", 0) == benchmark.shots
    if not benchmark.runs_code:
        assert benchmark.metric.partition(",")[0] in [entry["metric"] for entry in config["metric_list"]]


def test_mmlu_is_its_57_subjects_with_examples_of_the_same_subject(tmp_path: Path) -> None:
    assert len(_files(BENCHMARKS["mmlu"].config)) == 57
    rows = [
        {"question": f"{subject} {i}", "subject": subject, "choices": list("wxyz"), "answer": i % 4}
        for subject in ("anatomy", "virology")
        for i in range(7)
    ]
    write(tmp_path / "mmlu.jsonl", rows)
    task = load(replace(BENCHMARKS["mmlu"], data=tmp_path))
    assert (task.items(), task.shots, task.data) == (14, 5, "mmlu.jsonl, examples from the same file")
    first = task.requests()[0].args
    assert first[0].startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\nanatomy 1\n"
    )
    assert first[0].count("Answer:") == 6
    write(tmp_path / "mmlu_dev.jsonl", [{**row, "question": f"example {row['question']}"} for row in rows])
    task = load(replace(BENCHMARKS["mmlu"], data=tmp_path))
    assert task.data == "mmlu.jsonl, examples from mmlu_dev.jsonl"
    assert task.requests()[0].args[0].count("example anatomy") == 5
    (tmp_path / "mmlu_dev.jsonl").unlink()
    write(tmp_path / "mmlu.jsonl", rows[:4])
    with pytest.raises(ValueError, match=r"lm-eval cannot ask it: .* exceeds the 3 that are available"):
        load(replace(BENCHMARKS["mmlu"], data=tmp_path))


def test_a_limit_draws_the_same_items_each_time_and_not_the_first_ones(tmp_path: Path) -> None:
    rows = [{**ROWS["piqa"][0], "goal": f"goal {i}"} for i in range(50)]
    write(tmp_path / "piqa.jsonl", rows)
    asked = [
        [request.doc["goal"] for request in load(replace(BENCHMARKS["piqa"], data=tmp_path, limit=limit)).requests()][
            ::2
        ]
        for limit in (8, 8, 50, 99)
    ]
    assert asked[0] == asked[1] != [f"goal {i}" for i in range(8)]
    assert len(set(asked[0])) == 8
    assert asked[2] == asked[3] == [f"goal {i}" for i in range(50)]


def test_ones_own_task_is_measured_by_its_first_metric(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pocket.MODEL, dtype="float32").eval()
    found = measure(model, AutoTokenizer.from_pretrained(pocket.MODEL), [find(mine(tmp_path))]).tasks[0]
    assert (found.task, found.capability, found.metric, found.chance) == ("mine", "math", "acc", 0.5)
    assert len(found.item_scores) == 10


def test_a_file_of_ones_own_may_be_named_like_a_benchmark(tmp_path: Path) -> None:
    Path(mine(tmp_path).partition(":")[0]).rename(tmp_path / "piqa.yaml")
    write(tmp_path / "piqa.jsonl", ROWS["piqa"])
    found = load(replace(find(str(tmp_path / "piqa.yaml")), data=tmp_path))
    assert [found.requests()[0].args[0], found.items()] == ["Question: 0 + 0?\nAnswer:", 10]
    (tmp_path / "piqa.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"piqa\.yaml is not a task of lm-eval"):
        load(find(str(tmp_path / "piqa.yaml")))


def test_the_fingerprint_is_of_the_questions_and_of_how_a_task_of_ones_own_scores(tmp_path: Path) -> None:
    name = mine(tmp_path)
    first = load(find(name)).fingerprint()
    assert load(find(name)).fingerprint() == first
    (tmp_path / "scoring.py").write_text("LEAST = 1\n")
    second = load(find(name)).fingerprint()
    write(tmp_path / "mine.jsonl", [*ITEMS[1:], ITEMS[0]])
    third = load(find(name)).fingerprint()
    assert len({first, second, third}) == 3


def test_the_fingerprint_is_of_what_a_task_of_ones_own_includes_from_elsewhere(tmp_path: Path) -> None:
    """How answers are scored, the requests being equal."""
    (tmp_path / "tasks").mkdir()
    data = write(tmp_path / "mine.jsonl", ITEMS)
    (tmp_path / "tasks" / "mine.yaml").write_text("include: ../base.yaml\ntask: mine\n")

    def found(metric: str, body: str) -> str:
        (tmp_path / "scoring.py").write_text(f"def process(doc, results):\n    return {body}\n")
        text = MINE.format(path=data, metric=metric) + "process_results: !function scoring.process\n"
        (tmp_path / "base.yaml").write_text(text)
        task = load(find(str(tmp_path / "tasks" / "mine.yaml")))
        return task.fingerprint()

    first = found("acc", "{'acc': 1.0}")
    assert found("acc", "{'acc': 1.0}") == first
    assert len({first, found("acc_norm", "{'acc': 1.0}"), found("acc", "{'acc': 0.0, 'other': 1.0}")}) == 3


def test_scores_tell_other_prompts_and_labels_of_the_same_items_apart(tmp_path: Path) -> None:
    """`compare` pairs by the fingerprint in the scores."""
    model = AutoModelForCausalLM.from_pretrained(pocket.MODEL, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    write(tmp_path / "piqa.jsonl", [{**ROWS["piqa"][0], "goal": f"goal {i}"} for i in range(4)])
    task = replace(BENCHMARKS["piqa"], data=tmp_path)
    first, again, shots, metric = (
        measure(model, tokenizer, [each]).tasks[0]
        for each in (task, task, replace(task, shots=2), replace(task, metric="acc_norm"))
    )
    write(tmp_path / "piqa.jsonl", [{**ROWS["piqa"][0], "goal": f"goal {i}", "label": 0} for i in range(4)])
    labels = measure(model, tokenizer, [task]).tasks[0]
    assert first == again
    assert len({score.fingerprint for score in (first, shots, metric, labels)}) == 4


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("task: [a, b]\ngroup: g\n", "broken.yaml is not a task of lm-eval: .*it describes no single task"),
        ("task: t\nrepeats: 4\n", "it asks each question more than once, which is not done here"),
        ("task: t\nunsafe_code: true\n", "it runs generated code outside of our sandbox"),
        ("[1, 2]", "broken.yaml is not a task of lm-eval"),
        (
            "task: [a, b\n",
            r"broken.yaml is not a task of lm-eval: while parsing a flow sequence in .*, line 1, column 7",
        ),
        (
            "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: FOLDER/empty.jsonl}}\ntest_split: test",
            "^it has no items$",
        ),
        (
            "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: FOLDER/a.jsonl}}\ntest_split: test\n"
            "process_docs: !function none.left\ndoc_to_text: a\ndoc_to_target: b",
            "^it has no items$",
        ),
        (
            "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: FOLDER/a.jsonl}}\ntest_split: test\n"
            "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: question\nmetric_list: [{metric: word_perplexity}]",
            "it has no score for each item but a perplexity; the option perplexity_text measures one",
        ),
        (
            "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {train: FOLDER/a.jsonl}}\ntest_split: test",
            "lm-eval cannot read it: 'test'",
        ),
        (
            "task: t\ndataset_path: json\ndataset_kwargs: {data_files: FOLDER/b.jsonl}",
            "json cannot be had here: Unable to",
        ),
        (
            "task: t\ndataset_path: no/such-set\ntest_split: test\n",
            r"no/such-set cannot be had here \(HF_HUB_OFFLINE is set\)",
        ),
    ],
)
def test_a_file_that_is_no_task_is_refused(yaml: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ITEMS)
    write(tmp_path / "empty.jsonl", [])
    (tmp_path / "none.py").write_text("def left(docs):\n    return docs.select([])\n")
    (tmp_path / "broken.yaml").write_text(yaml.replace("FOLDER", str(tmp_path)))
    with pytest.raises(ValueError, match=message):
        load(find(str(tmp_path / "broken.yaml")))


def test_a_metric_that_is_not_one_of_each_item_is_refused(tmp_path: Path) -> None:
    task = load(find(mine(tmp_path, metric="f1")))
    with pytest.raises(
        ValueError, match=r"its metric 'f1' gives \(0, .* for an item; only metrics that give each item"
    ):
        task.scores([(-1.0, False)] * 20, AutoTokenizer.from_pretrained(pocket.MODEL))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no\\nroom')", r"its scoring fails: RuntimeError\('no.*room'\)\.$"),
        ("return {}", r"its scoring fails: ValueError\('it gives an item no metric'\)\.$"),
        ("return {}['acc']", r"its scoring fails: KeyError\('acc'\)\.$"),
    ],
)
def test_a_scoring_of_ones_own_that_fails_is_told_in_a_sentence(body: str, message: str, tmp_path: Path) -> None:
    name = mine(tmp_path)
    (tmp_path / "scoring.py").write_text(f"def process(doc, results):\n    {body}\n")
    with (tmp_path / "mine.yaml").open("a") as file:
        file.write("process_results: !function scoring.process\n")
    model = AutoModelForCausalLM.from_pretrained(pocket.MODEL, dtype="float32").eval()
    with pytest.raises(ValueError, match=rf"^Task 'mine' cannot be measured: {message}"):
        measure(model, AutoTokenizer.from_pretrained(pocket.MODEL), [find(name)])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "there is no piqa.jsonl among the local files"),
        ("", "piqa.jsonl has no items"),
        ("not json\n", "piqa.jsonl, line 1: not an item of piqa"),
    ],
)
def test_local_data_that_does_not_do_is_refused_or_named(rows: str | None, message: str, tmp_path: Path) -> None:
    if rows is not None:
        (tmp_path / "piqa.jsonl").write_text(rows)
    task = replace(BENCHMARKS["piqa"], data=tmp_path)
    with pytest.raises(ValueError, match=rf"Task 'piqa' cannot be measured: {message}"):
        prepare([task])
    capabilities, tasks = prepare([task], required=False).not_measured(["general"])
    assert message in capabilities["commonsense"]
    assert tasks == {}
    assert message in prepare([task], required=False).not_measured(["commonsense"])[1]["piqa"]


def test_a_data_set_that_is_not_here_is_named() -> None:
    found = prepare([BENCHMARKS["hellaswag"], BENCHMARKS["mmlu"]], required=False)
    assert found.tasks == []
    assert found.missing["mmlu"] == ("general", "cais/mmlu cannot be had here (HF_HUB_OFFLINE is set)")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def unreachable(task: Benchmark, token: str | None) -> None:
        asked.append(task.name)
        raise ConnectionError(f"{task.repo} cannot be had here: no route")

    monkeypatch.setattr(scoring, "load", unreachable)
    found = prepare([BENCHMARKS["mmlu"], BENCHMARKS["sciq"], BENCHMARKS["piqa"]], required=False)
    assert asked == ["mmlu"]
    assert found.missing["mmlu"] == ("general", "cais/mmlu cannot be had here: no route")
    assert found.not_measured(()) == (
        {
            "general": "cais/mmlu cannot be had here: no route (mmlu); the Hub cannot be reached (sciq)",
            "commonsense": "the Hub cannot be reached (piqa)",
        },
        {},
    )


MATH500 = [
    {"problem": "What is $1/2 + 1/4$?", "solution": "It is $\\boxed{\\frac{3}{4}}$.", "answer": "\\frac{3}{4}"},
    {"problem": "What is $2 \\cdot 3$?", "solution": "It is $\\boxed{6}$.", "answer": "6"},
]


def test_math500_is_scored_as_minerva_does(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    write(tmp_path / "minerva_math500.jsonl", MATH500)
    task = load(replace(BENCHMARKS["minerva_math500"], data=tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    assert task.requests()[0].args[0].count("Problem:") == 5
    right = [
        " So.\nFinal Answer: The final answer is $3/4$. I hope it is correct.",
        "Final Answer: The final answer is $6$.",
    ]
    assert task.scores(right, tokenizer) == ("exact_match", (1.0, 0.0)), "without its last sentence it is no answer"
    assert task.scores([right[1], right[0]], tokenizer)[1] == (0.0, 0.0)


def test_math500_says_what_it_needs_where_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "minerva_math500.jsonl", MATH500)
    monkeypatch.setitem(sys.modules, "antlr4", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.minerva_math.utils", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'optimum-calibprune\[math\]'"):
        load(replace(BENCHMARKS["minerva_math500"], data=tmp_path))
