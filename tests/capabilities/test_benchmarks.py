# SPDX-License-Identifier: Apache-2.0
"""Benchmarks on real data: item by item what stock lm-eval finds with the same task definitions."""

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


@cache
def model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    loaded = AutoModelForCausalLM.from_pretrained(MODELS[name], dtype="float32").eval()
    return loaded, AutoTokenizer.from_pretrained(MODELS[name])


def loaded(name: str, limit: int | None) -> Loaded:
    return load(replace(BENCHMARKS[name], limit=limit, data=DATA))


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
