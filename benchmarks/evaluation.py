# SPDX-License-Identifier: Apache-2.0
"""How long an evaluation takes, beside stock lm-eval in the same run: the pocket's probes, 500 items of HellaSwag, 40 each of
GSM8K and MBPP.

    python benchmarks/evaluation.py --task-data DIR [--threads 2] [--repeats 3]

DIR holds `hellaswag.jsonl` or `hellaswag_val.jsonl`, and likewise `gsm8k` and `mbpp`. Both answer the same requests of the same
tasks with the pocket model, in turn; stock lm-eval with the batch size, of those tried, at which it is fastest. What is timed is
the asking and scoring, not the loading. Every score is compared. MBPP has one example in its prompts: with three the pocket's
context would cut off their beginning, as it does with GSM8K's. Writes `benchmarks/results/evaluation.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_calibprune import machine, pocket
from optimum_calibprune.capabilities.benchmarks import BENCHMARKS
from optimum_calibprune.capabilities.engine import Engine
from optimum_calibprune.capabilities.score import Loaded, Probes, ask, prepare
from optimum_calibprune.capabilities.tasks import pocket_tasks
from optimum_calibprune.records import CAPABILITIES


RESULT = Path(__file__).parent / "results" / "evaluation.json"
BATCHES = (8, 32)


def timed(engine: HFLM, tasks: list[Loaded | Probes], tokenizer: Any) -> tuple[float, dict[str, Any]]:
    """Seconds for asking and scoring tasks, and the scores by task."""
    found = {}
    started = time.perf_counter()
    for task in tasks:
        found[task.name] = task.scores(ask(engine, task.requests()), tokenizer)[1]
    return time.perf_counter() - started, found


def compare(tasks: list[Loaded | Probes], repeats: int) -> dict[str, Any]:
    """Ours and stock lm-eval in turn: medians, every time, the batch size that was best for stock, and how many items
    were scored differently."""
    model = AutoModelForCausalLM.from_pretrained(pocket.MODEL, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    ours = Engine(model, tokenizer)
    theirs = {size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, device="cpu") for size in BATCHES}
    seconds: dict[str, list[float]] = {"ours": []} | {f"lm-eval, batches of {size}": [] for size in BATCHES}
    differing = 0
    for _ in range(repeats):
        spent, scores = timed(ours, tasks, tokenizer)
        seconds["ours"].append(spent)
        for size, engine in theirs.items():
            spent, others = timed(engine, tasks, tokenizer)
            seconds[f"lm-eval, batches of {size}"].append(spent)
            differing = max(
                differing,
                sum(a != b for name in scores for a, b in zip(scores[name], others[name], strict=True)),
            )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min((name for name in medians if name != "ours"), key=lambda name: medians[name])
    return {
        "items": sum(task.items() for task in tasks),
        "seconds": {name: [round(value, 2) for value in times] for name, times in seconds.items()},
        "ours": round(medians["ours"], 2),
        "lm-eval": round(medians[best], 2),
        "best of lm-eval": best,
        "times as fast": round(medians[best] / medians["ours"], 2),
        "items scored differently": differing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task-data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    suites = {
        "pocket": pocket_tasks(CAPABILITIES),
        "500 of hellaswag": [replace(BENCHMARKS["hellaswag"], limit=500, data=given.task_data)],
        "40 of gsm8k": [replace(BENCHMARKS["gsm8k"], limit=40, data=given.task_data)],
        "40 of mbpp": [replace(BENCHMARKS["mbpp"], limit=40, shots=1, data=given.task_data)],
    }
    results = {}
    for name, tasks in suites.items():
        results[name] = compare(prepare(tasks).tasks, given.repeats)
        found = results[name]
        print(
            f"{name}: {found['ours']} s, {found['best of lm-eval']} {found['lm-eval']} s, "
            f"{found['items scored differently']} of {found['items']} items scored differently",
            flush=True,
        )
    made = {"model": "pocket", "threads": given.threads, "suites": results}
    made |= {"versions": machine.versions(), "hardware": machine.hardware(torch.device("cpu"))}
    RESULT.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
