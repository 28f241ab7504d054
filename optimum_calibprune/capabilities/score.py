# SPDX-License-Identifier: Apache-2.0
"""Scores a model on tasks: lm-eval asks the model, the three kinds of scoring stand here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..records import Scores, TaskScore
from .sandbox import SandboxUnavailable, isolation, run_programs
from .tasks import Task, lm_eval_config, read


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Progress = Callable[[int, int, str], None]
Responses = list[list[Any]]  # for each item what lm-eval returned: (log-likelihood, greedy) a choice, or one text


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    on_progress: Progress | None = None,
) -> Scores:
    """The score of every item of every task. Generated code runs in the sandbox, or, where nothing can be isolated
    here, not at all: its capability is then not measured."""
    from .engine import Engine

    for name in ("lm_eval", "lm_eval.api.task", "lm_eval.evaluator", "lm_eval.models.huggingface"):
        logging.getLogger(name).setLevel(logging.ERROR)  # notices about models that come from memory, as ours do
    engine = Engine(model, tokenizer)
    results, not_measured = [], {}
    for i, task in enumerate(tasks):
        if on_progress is not None:
            on_progress(i, len(tasks), task.name)
        if task.kind == "pass@1" and not isolation().available:
            not_measured[task.capability] = f"generated code cannot be isolated here: {isolation().reason}"
            continue
        responses = _responses(engine, task)
        try:
            items = score(task, responses, tokenizer)
        except SandboxUnavailable as error:  # what worked at the start may fail later, on a machine without memory
            not_measured[task.capability] = str(error)
            continue
        results.append(TaskScore(task.name, task.capability, task.kind, task.chance, items))
    if on_progress is not None:
        on_progress(len(tasks), len(tasks), "")
    return Scores(tuple(results), not_measured)


def _responses(engine: Any, task: Task) -> Responses:
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load([lm_eval_config(task)])
    answered = evaluate(lm=engine, task_dict=loaded, bootstrap_iters=0, log_samples=True)
    samples = sorted(answered["samples"][task.name], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def score(task: Task, responses: Responses, tokenizer: PreTrainedTokenizerBase) -> tuple[float, ...]:
    """1 or 0 for each item."""
    items = read(task)
    if task.kind == "multiple_choice":
        return tuple(_multiple_choice(item, answer, tokenizer) for item, answer in zip(items, responses, strict=True))
    texts = [answer[0] for answer in responses]
    if task.kind == "exact_match":
        return tuple(_exact_match(task, item, text) for item, text in zip(items, texts, strict=True))
    if task.kind == "pass@1":
        programs = [f"{item['prompt']}{text}\n\n{item['tests']}\n" for item, text in zip(items, texts, strict=True)]
        return tuple(float(verdict.passed) for verdict in run_programs(programs))
    raise AssertionError(task.kind)


def _multiple_choice(item: dict[str, Any], answers: list[Any], tokenizer: PreTrainedTokenizerBase) -> float:
    """Right where the right choice has the highest mean log-likelihood a token; ties go to the first choice."""
    prompt = len(tokenizer(item["prompt"])["input_ids"])
    lengths = [len(tokenizer(item["prompt"] + choice)["input_ids"]) - prompt for choice in item["choices"]]
    means = [likelihood / max(1, n) for (likelihood, _), n in zip(answers, lengths, strict=True)]
    return float(means.index(max(means)) == item["answer"])


def _exact_match(task: Task, item: dict[str, Any], text: str) -> float:
    """Right where what stands after the marker on the first line equals the target, white space aside."""
    line = text.partition("\n")[0]
    answer = line.rpartition(task.marker)[2] if task.marker and task.marker in line else line
    return float(answer.strip() == str(item["target"]).strip())
