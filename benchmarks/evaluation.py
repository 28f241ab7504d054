# SPDX-License-Identifier: Apache-2.0
"""How long an evaluation takes, beside stock lm-eval in the same run: the pocket's probes, 500 items of HellaSwag, 24 each of
GSM8K and MBPP.

    python benchmarks/evaluation.py --task-data DIR [--threads 2] [--repeats 3] [--suites mbpp ...]

DIR holds `hellaswag.jsonl` or `hellaswag_val.jsonl`, and likewise `gsm8k` and `mbpp`. Both answer the same requests of the same
tasks with the pocket model, in turn; stock lm-eval with the batch size, of those tried, at which it is fastest. What is timed is
the asking and scoring, not the loading. Every score is compared, and every text. MBPP has one example in its prompts: with three
the pocket's context would cut off their beginning, as it does with GSM8K's. Writes `benchmarks/results/evaluation.json`, where
suites that are not measured stay as they are.
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
SUITES = {
    "pocket": [],  # its probes
    "hellaswag": [replace(BENCHMARKS["hellaswag"], limit=500)],
    "gsm8k": [replace(BENCHMARKS["gsm8k"], limit=24)],
    "mbpp": [replace(BENCHMARKS["mbpp"], limit=24, shots=1)],
}


def timed(engine: HFLM, tasks: list[Loaded | Probes], tokenizer: Any) -> tuple[float, float, dict[str, Any]]:
    """Seconds for asking and scoring tasks, by the clock and of processor time, and by task the score of each item, with the
    text where one is written."""
    found = {}
    started, used = time.perf_counter(), time.process_time()
    for task in tasks:
        answers = ask(engine, task.requests())
        scores = task.scores(answers, tokenizer)[1]
        found[task.name] = list(zip(scores, answers, strict=True)) if isinstance(answers[0], str) else scores
    return time.perf_counter() - started, time.process_time() - used, found


def compare(tasks: list[Loaded | Probes], repeats: int) -> dict[str, Any]:
    """Ours and stock lm-eval in turn: medians, every time, the batch size that was best for stock, and how many items
    were answered or scored differently."""
    model = AutoModelForCausalLM.from_pretrained(pocket.MODEL, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(pocket.MODEL)
    ours = Engine(model, tokenizer)
    theirs = {size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, device="cpu") for size in BATCHES}
    seconds: dict[str, list[float]] = {"ours": []} | {f"lm-eval, batches of {size}": [] for size in BATCHES}
    processor: dict[str, list[float]] = {name: [] for name in seconds}
    differing = 0
    for _ in range(repeats):
        spent, used, scores = timed(ours, tasks, tokenizer)
        seconds["ours"].append(spent)
        processor["ours"].append(used)
        for size, engine in theirs.items():
            spent, used, others = timed(engine, tasks, tokenizer)
            seconds[f"lm-eval, batches of {size}"].append(spent)
            processor[f"lm-eval, batches of {size}"].append(used)
            differing = max(
                differing,
                sum(a != b for name in scores for a, b in zip(scores[name], others[name], strict=True)),
            )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min((name for name in medians if name != "ours"), key=lambda name: medians[name])
    return {
        "items": sum(task.items() for task in tasks),
        "seconds": {name: [round(value, 2) for value in times] for name, times in seconds.items()},
        "processor seconds": {name: [round(value, 2) for value in times] for name, times in processor.items()},
        "ours": round(medians["ours"], 2),
        "lm-eval": round(medians[best], 2),
        "best of lm-eval": best,
        "times as fast": round(medians[best] / medians["ours"], 2),
        "items that differ": differing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task-data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES, metavar="NAME", help=", ".join(SUITES))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = json.loads(RESULT.read_text(encoding="utf-8"))["suites"] if RESULT.is_file() else {}
    for name in given.suites:
        tasks = [replace(task, data=given.task_data) for task in SUITES[name]] or pocket_tasks(CAPABILITIES)
        found = results[name] = compare(prepare(tasks).tasks, given.repeats) | {"threads": given.threads}
        print(
            f"{name}: {found['ours']} s, {found['best of lm-eval']} {found['lm-eval']} s, "
            f"{found['items that differ']} of {found['items']} items differ",
            flush=True,
        )
    made = {"model": "pocket", "suites": results}
    made |= {"versions": machine.versions(), "hardware": machine.hardware(torch.device("cpu"))}
    RESULT.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
