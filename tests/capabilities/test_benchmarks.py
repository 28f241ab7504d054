# SPDX-License-Identifier: Apache-2.0
"""Benchmarks on real data, and on rows of our own: item by item what stock lm-eval finds with the same task definitions."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from optimum_calibprune import pocket
from optimum_calibprune.capabilities.batches import by_beginning
from optimum_calibprune.capabilities.benchmarks import BENCHMARKS
from optimum_calibprune.capabilities.engine import Engine
from optimum_calibprune.capabilities.harness import EXAMPLES_SEED, Loaded, load
from optimum_calibprune.capabilities.sandbox import isolation
from optimum_calibprune.capabilities.score import measure


SHARED = Path(__file__).resolve().parents[2] / "../shared"
DATA, STORIES = SHARED / "data/evaluation", SHARED / "models/stories260K"
MODELS = {"pocket": pocket.MODEL, "stories260K": STORIES}
here = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the data sets in {DATA}")
CHOICES = ["mmlu", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "piqa", "commonsense_qa"]


# What is told, what is asked of it, the right answer and three wrong ones, a question of yes or no, and its answer.
FACTS = [
    ("Bees make honey from nectar.", "What do bees make?", "honey wax milk silk", "do bees make honey", 1),
    ("Ice melts above zero degrees.", "What melts above zero degrees?", "ice iron stone glass", "does ice melt", 1),
    ("The moon goes round the earth.", "What goes round the earth?", "moon sun Mars sky", "does the sun go round the earth", 0),
    ("Fish breathe with gills.", "With what do fish breathe?", "gills lungs skin fins", "do fish have lungs", 0),
    ("A spider has eight legs.", "What has eight legs?", "spider ant cat bird", "does a spider have six legs", 0),
    ("Plants need light to grow.", "What do plants need to grow?", "light salt sand wind", "can plants grow in the dark", 0),
    ("Copper carries electric current well.", "What carries current?", "copper wood rubber wool", "is copper a conductor", 1),
    ("Whales are mammals that live in the sea.", "What is a whale?", "mammal fish reptile insect", "is a whale a fish", 0),
    ("Blood is pumped by the heart.", "What pumps blood?", "heart liver lung bone", "does the heart pump blood", 1),
    ("Rust forms where iron meets water and air.", "What rusts?", "iron gold glass clay", "can iron rust", 1),
    ("Owls hunt at night.", "When do owls hunt?", "night noon morning never", "do owls hunt by day", 0),
    ("Sound is slower than light.", "What is slower than light?", "sound nothing everything gravity", "is sound the faster one", 0),
    ("Tom put the red ball in the box.", "What is in the box?", "ball cat hat book", "is there a ball in the box", 1),
    ("Lily went home when it began to rain.", "Why did Lily go home?", "rain hunger snow anger", "did Lily stay outside", 0),
    ("The cat slept on the warm bed all day.", "Who slept?", "cat dog Tom bird", "did the cat sleep", 1),
    ("Salt dissolves in water.", "What dissolves in water?", "salt sand oil wood", "does sand dissolve in water", 0),
    ("Magnets attract iron.", "What do magnets attract?", "iron paper glass wood", "do magnets attract iron", 1),
    ("Steam is water that has become a gas.", "What is steam?", "water air smoke oil", "is steam a gas", 1),
    ("Frogs lay their eggs in water.", "Where do frogs lay eggs?", "water trees sand nests", "do frogs lay eggs in trees", 0),
    ("A year has twelve months.", "What has twelve months?", "year week day hour", "does a year have ten months", 0),
]  # fmt: skip


def own_rows(name: str) -> list[dict[str, Any]]:
    """Rows with the columns of the Hub's data set, for tasks of which there is no real data here."""
    if name == "minerva_math500":
        return [
            {
                "problem": f"Tom has {a} apples and buys {b} bags of ${a + 1}$ apples. How many has he now?",
                "solution": f"The bags hold ${b} \\cdot {a + 1}$ apples, so he has $\\boxed{{{a + b * (a + 1)}}}$.",
                "answer": str(a + b * (a + 1)),
                "subject": "Prealgebra",
                "level": 1,
                "unique_id": f"test/prealgebra/{a}.json",
            }
            for a, b in zip(range(1, 21), [2, 3, 5, 7] * 5, strict=True)
        ]
    if name == "boolq":
        asked = [(passage, question, label) for passage, _, _, question, label in FACTS]
        return [
            {"question": question, "passage": passage, "idx": i, "label": label}
            for i, (passage, question, label) in enumerate(asked)
        ]
    columns = ("correct_answer", "distractor1", "distractor2", "distractor3")
    return [
        {"question": question, "support": passage, **dict(zip(columns, answers.split(), strict=True))}
        for passage, question, answers, *_ in FACTS
    ]


@cache
def model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    loaded = AutoModelForCausalLM.from_pretrained(MODELS[name], dtype="float32").eval()
    return loaded, AutoTokenizer.from_pretrained(MODELS[name])


def loaded(name: str, limit: int | None) -> Loaded:
    return load(replace(BENCHMARKS[name], limit=limit, data=DATA))


def of_own_rows(name: str, folder: Path) -> Loaded:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own_rows(name)))
    return load(replace(BENCHMARKS[name], data=folder))


def of_one_subject(folder: Path) -> Loaded:
    """24 items of MMLU whose prompts begin with the same examples, in a file of their own."""
    rows = [
        json.loads(line) for line in (DATA / "mmlu_validation.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    chosen = [row for row in rows if row["subject"] == "high_school_psychology"]
    (folder / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen[5:29]))
    (folder / "mmlu_dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen[:5]))
    return load(replace(BENCHMARKS["mmlu"], data=folder))


def stock(task: Loaded, name: str) -> list[dict[str, Any]]:
    """What lm-eval's own evaluation logs of the same tasks and items, in their order."""
    fresh = load(task.benchmark)
    parts = {part.config.task: part for part in fresh.parts}
    for part in parts.values():
        part.set_fewshot_seed(EXAMPLES_SEED)
    loaded_model, tokenizer = model(name)
    lm = HFLM(pretrained=loaded_model, tokenizer=tokenizer, batch_size=8, device="cpu")
    found = evaluate(lm=lm, task_dict={"tasks": parts}, samples=fresh.drawn, bootstrap_iters=0, log_samples=True)
    logged = [sample for part in parts for sample in found["samples"][part]]
    chosen = task.benchmark.metric.partition(",")[2]
    return [sample for sample in logged if chosen in ("", sample["filter"])]


@here
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("benchmark", CHOICES)
def test_every_decision_on_a_choice_is_that_of_stock_lm_eval(benchmark: str, name: str) -> None:
    task = loaded(benchmark, 40)
    found = measure(*model(name), [task.benchmark]).tasks[0]
    samples = stock(task, name)
    assert found.item_scores == tuple(sample[task.benchmark.metric] for sample in samples)
    assert len(found.item_scores) == 40
    assert 0 < found.value < 1
    ours = Engine(*model(name)).loglikelihood(task.requests())
    theirs = [answer for sample in samples for answer in sample["filtered_resps"]]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=2e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("benchmark", ["boolq", "sciq"])
def test_every_decision_on_rows_of_our_own_is_that_of_stock_lm_eval(benchmark: str, name: str, tmp_path: Path) -> None:
    task = of_own_rows(benchmark, tmp_path)
    found = measure(*model(name), [task.benchmark]).tasks[0]
    samples = stock(task, name)
    assert found.item_scores == tuple(sample["acc"] for sample in samples)
    assert len(found.item_scores) == 20
    assert 0 < found.value < 1
    ours = Engine(*model(name)).loglikelihood(task.requests())
    theirs = [answer for sample in samples for answer in sample["filtered_resps"]]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=2e-3)


@here
def test_prompts_that_begin_alike_are_answered_as_by_stock_lm_eval(tmp_path: Path) -> None:
    task = of_one_subject(tmp_path)
    engine = Engine(*model("pocket"))
    prompts = sorted({prompt for prompt, _ in engine._encode_pairs([request.args for request in task.requests()])})
    parts = by_beginning(prompts)
    assert [len(part) for _, part in parts] == [24]
    assert parts[0][0] > 200, "the examples are computed once"
    samples = stock(task, "pocket")
    ours, theirs = engine.loglikelihood(task.requests()), [a for sample in samples for a in sample["filtered_resps"]]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=2e-3)
    assert task.scores(ours, model("pocket")[1])[1] == tuple(sample["acc"] for sample in samples)


@here
@pytest.mark.parametrize("name", MODELS)
def test_every_text_and_exact_match_is_that_of_stock_lm_eval(name: str) -> None:
    task = loaded("gsm8k", 24)
    found = measure(*model(name), [task.benchmark]).tasks[0]
    samples = stock(task, name)
    assert found.item_scores == tuple(sample["exact_match"] for sample in samples)
    ours = Engine(*model(name)).generate_until(task.requests())
    assert ours == [sample["resps"][0][0] for sample in samples]
    assert len(set(ours)) > 12


@pytest.mark.parametrize("name", MODELS)
def test_every_text_and_score_of_math500_is_that_of_stock_lm_eval(name: str, tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    task = of_own_rows("minerva_math500", tmp_path)
    tokenizer = model(name)[1]
    end = "Final Answer: The final answer is ${}$. I hope it is correct."
    right = [end.format(row["answer"]) for row in own_rows("minerva_math500")]
    assert task.scores(right, tokenizer)[1] == (1.0,) * 20
    assert task.scores([end.format("7919")] * 20, tokenizer)[1] == (0.0,) * 20
    some = load(replace(task.benchmark, limit=4))
    samples = stock(some, name)
    ours = Engine(*model(name)).generate_until(some.requests())
    assert ours == [sample["resps"][0][0] for sample in samples]
    assert some.scores(ours, tokenizer)[1] == tuple(sample["exact_match"] for sample in samples)


@here
@pytest.mark.parametrize("name", MODELS)
def test_every_program_that_is_written_for_mbpp_is_that_of_stock_lm_eval(name: str) -> None:
    task = loaded("mbpp", 4)
    ours = Engine(*model(name)).generate_until(task.requests())
    assert ours == [sample["resps"][0][0] for sample in stock(task, name)]
    assert len(set(ours)) == 4


@here
def test_right_answers_count_and_wrong_ones_do_not() -> None:
    task = loaded("gsm8k", 50)
    tokenizer = model("pocket")[1]
    right = [f" So it is.\n#### {request.doc['answer'].rpartition('#### ')[2]}" for request in task.requests()]
    assert task.scores(right, tokenizer) == ("exact_match,strict-match", (1.0,) * 50)
    assert set(task.scores([text + "1" for text in right], tokenizer)[1]) == {0.0}
    assert set(task.scores([text.replace("####", "") for text in right], tokenizer)[1]) == {0.0}


@here
@pytest.mark.parametrize(("benchmark", "items"), [("humaneval", 164), ("mbpp", 500)])
def test_every_canonical_solution_passes_and_none_that_returns_nothing(benchmark: str, items: int) -> None:
    if not isolation().available:
        pytest.skip(f"code cannot be isolated here: {isolation().reason}")
    task = loaded(benchmark, None)
    tokenizer = model("pocket")[1]
    solution = "canonical_solution" if benchmark == "humaneval" else "code"
    metric, scores = task.scores([request.doc[solution] for request in task.requests()], tokenizer)
    assert metric == "pass@1"
    assert len(scores) == items
    failed = [request.doc["task_id"] for request, score in zip(task.requests(), scores, strict=True) if score != 1.0]
    assert failed == (
        [] if benchmark == "humaneval" else [367]
    )  # its tests need `test_setup_code`, which lm-eval leaves out
    some = loaded(benchmark, 25)
    assert set(some.scores(["    return None\n"] * 25, tokenizer)[1]) == {0.0}
