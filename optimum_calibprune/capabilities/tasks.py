# SPDX-License-Identifier: Apache-2.0
"""Which tasks stand for a capability, and how lm-eval is told about them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import pocket


COLUMNS = {
    "multiple_choice": ("prompt", "choices", "answer"),
    "exact_match": ("prompt", "target"),
    "pass@1": ("prompt", "tests"),
}


@dataclass(frozen=True)
class Task:
    """A task of one capability, from a local JSON-lines file.

    `kind` is `"multiple_choice"` (columns `prompt`, `choices`, `answer`: the index; the choice with the highest mean
    log-likelihood a token counts), `"exact_match"` (`prompt`, `target`) or `"pass@1"` (`prompt`, `tests`). Generation is
    greedy and ends at `until`; `marker` is what stands before the answer of an exact match.
    """

    name: str
    capability: str
    kind: str
    path: Path
    chance: float = 0.0
    until: str = "\n"
    max_tokens: int = 96
    marker: str = ""

    @property
    def runs_code(self) -> bool:
        return self.kind == "pass@1"


def pocket_tasks(capabilities: Iterable[str], folder: Path | None = None) -> list[Task]:
    """The probes of the pocket model; `chance` is one in four choices where there are choices.

    `folder` holds other probes in files of the same names, `general.jsonl`, ..., and the same columns. Raises
    `FileNotFoundError` where one of those that are wanted is missing.
    """
    wanted = set(capabilities)
    paths = pocket.probes()
    if folder is not None:
        paths = {name: folder / path.name for name, path in paths.items()}
        missing = [str(path) for name, path in paths.items() if name in wanted and not path.is_file()]
        if missing:
            raise FileNotFoundError(f"There is no file {', '.join(missing)}; each capability needs its probes.")
    every = [
        Task("pocket_general", "general", "multiple_choice", paths["general"], chance=0.25),
        Task("pocket_commonsense", "commonsense", "multiple_choice", paths["commonsense"], chance=0.25),
        Task("pocket_code", "code", "pass@1", paths["code"], until="\n\n"),
        Task("pocket_math", "math", "exact_match", paths["math"], marker="####"),
    ]
    return [task for task in every if task.capability in wanted]


def read(task: Task) -> list[dict[str, Any]]:
    """The items of a task; `ValueError` for a file without any, or with one that lacks a column."""
    lines = [line for line in task.path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"Task {task.name!r} has no items: {task.path} is empty.")
    items = []
    for line in lines:
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{task.path} is not a JSON-lines file: {line[:60]!r}.") from error
        missing = [name for name in COLUMNS[task.kind] if not isinstance(item, dict) or name not in item]
        if missing:
            raise ValueError(f"{task.path}: an item has no {' and no '.join(missing)}; it starts with {line[:60]!r}.")
        items.append(item)
    return items


def lm_eval_config(task: Task) -> dict[str, Any]:
    """The inline task of lm-eval that asks for what `score.py` needs: log-likelihoods or a greedy continuation."""
    from datasets import Dataset

    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(read(task))},
        "test_split": "test",
        "doc_to_text": lambda row: row["prompt"],
        "target_delimiter": "",
        "process_results": lambda row, responses: {},  # score.py reads the responses themselves
        "metadata": {"version": 1.0},
    }
    if task.kind == "multiple_choice":
        return config | {
            "output_type": "multiple_choice",
            "doc_to_choice": lambda row: row["choices"],
            "doc_to_target": lambda row: row["answer"],
        }
    return config | {
        "output_type": "generate_until",
        "doc_to_target": lambda row: "",
        "generation_kwargs": {"until": [task.until], "do_sample": False, "max_gen_toks": task.max_tokens},
    }
