# SPDX-License-Identifier: Apache-2.0
"""How a row of a data set becomes a document."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..records import CalibrationSource


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


def _arc(row: Mapping[str, Any]) -> str:
    answer = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
    return f"Question: {row['question']}\nAnswer: {answer}"


def _winogrande(row: Mapping[str, Any]) -> str:
    return row["sentence"].replace("_", row[f"option{row['answer']}"])


def _hellaswag(row: Mapping[str, Any]) -> str:
    return f"{row['ctx']} {row['endings'][int(row['label'])]}"


def _piqa(row: Mapping[str, Any]) -> str:
    return f"Question: {row['goal']}\nAnswer: {row['sol1'] if int(row['label']) == 0 else row['sol2']}"


def _gsm8k(row: Mapping[str, Any]) -> str:
    solution = re.sub(r"<<.*?>>", "", row["answer"])  # the calculator marks are no language
    return f"Question: {row['question']}\nAnswer: {solution}"


READERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "arc": _arc,
    "winogrande": _winogrande,
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "gsm8k": _gsm8k,
}


def document(source: CalibrationSource, row: Any, tokenizer: PreTrainedTokenizerBase) -> str | list[int]:
    """A row's text, or its token ids where it holds them already.

    Raises `ValueError` where the row lacks a column, naming those that it has.
    """
    if isinstance(row, str):
        return row
    if isinstance(row, list | tuple):
        return [int(i) for i in row]
    if "input_ids" in row:
        return [int(i) for i in row["input_ids"]]
    try:
        if source.text.startswith("chat:"):
            return _chat(row[source.text.removeprefix("chat:")], tokenizer)
        if source.text in READERS:
            return READERS[source.text](row)
        return source.text.format_map(row)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"A row of source {source.name!r} does not fit {source.text!r}: {error} is missing. "
            f"Its columns are: {', '.join(map(str, row))}."
        ) from error


def _chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    logger.warning("The tokenizer has no chat template; the messages of a chat are joined by blank lines.")
    return "\n\n".join(message["content"] for message in messages)
