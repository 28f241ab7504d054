# SPDX-License-Identifier: Apache-2.0
"""The data of benchmarks from local files, in the columns that they have on the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


Row = dict[str, Any]
EVALUATED = ("", "_test", "_validation", "_val")
EXAMPLES = ("_train", "_dev")
LETTERS = "ABCDEFGHIJ"


def evaluated(name: str, folder: Path) -> tuple[list[Row], str] | None:
    """The rows of `NAME.jsonl`, `NAME_test.jsonl`, `NAME_validation.jsonl` or `NAME_val.jsonl`, and the file's name; None
    where there is none of them. Raises `ValueError` for a file without rows, or with rows of another kind."""
    return _first(name, folder, EVALUATED)


def examples(name: str, folder: Path) -> tuple[list[Row], str] | None:
    """The same of `NAME_train.jsonl` or `NAME_dev.jsonl`, from which examples for the prompt are taken."""
    return _first(name, folder, EXAMPLES)


def _first(name: str, folder: Path, endings: tuple[str, ...]) -> tuple[list[Row], str] | None:
    path = next((p for ending in endings if (p := folder / f"{name}{ending}.jsonl").is_file()), None)
    if path is None:
        return None
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_as_on_the_hub(name, json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{path.name}, line {number}: not an item of {name} ({error!r}): {line[:60]!r}."
            ) from error
    if not rows:
        raise ValueError(f"{path.name} has no items.")
    return rows, path.name


def _as_on_the_hub(name: str, row: Row) -> Row:
    """A row with the columns of the Hub's data set; rows that have a `query` and `choices` or a `prompt` instead, as some
    collections keep them, are given those."""
    return OTHER_COLUMNS[name](row) if name in OTHER_COLUMNS else row


def _question(row: Row) -> Row:
    """Of ARC and CommonsenseQA."""
    if "query" not in row:
        return row
    texts = list(row["choices"])
    question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    labels = list(LETTERS[: len(texts)])
    return {
        "id": row.get("id", ""),
        "question": question,
        "choices": {"text": texts, "label": labels},
        "answerKey": labels[row["gold"]],
    }


def _hellaswag(row: Row) -> Row:
    """Its `query` is the activity, a colon, and the beginning of what happens."""
    if "query" not in row:
        return row
    activity, _, context = row["query"].partition(": ")
    return {
        "activity_label": activity,
        "ctx_a": context,
        "ctx_b": "",
        "endings": list(row["choices"]),
        "label": str(row["gold"]),
    }


def _mbpp(row: Row) -> Row:
    if "test" not in row:
        return row
    return {"task_id": row["task_id"], "text": row["prompt"], "code": row["code"], "test_list": list(row["test"])}


OTHER_COLUMNS: dict[str, Callable[[Row], Row]] = {
    "arc_easy": _question,
    "arc_challenge": _question,
    "commonsense_qa": _question,
    "hellaswag": _hellaswag,
    "mbpp": _mbpp,
}
