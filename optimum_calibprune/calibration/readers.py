# SPDX-License-Identifier: Apache-2.0
"""How a row of a data set becomes a document."""

from __future__ import annotations

import operator
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..records import CalibrationSource, unknown


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PERMISSIVE = ("apache-2.0", "bsd-2-clause", "bsd-3-clause", "isc", "mit", "unlicense", "cc0-1.0")


def _arc(row: Mapping[str, Any]) -> str:
    answer = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
    return f"Question: {row['question']}\nAnswer: {answer}"


def _winogrande(row: Mapping[str, Any]) -> str:
    return row["sentence"].replace("_", row[f"option{row['answer']}"])


def _hellaswag(row: Mapping[str, Any]) -> str:
    return f"{row['ctx']} {_chosen(row['endings'], row['label'])}"


def _piqa(row: Mapping[str, Any]) -> str:
    return f"Question: {row['goal']}\nAnswer: {_chosen([row['sol1'], row['sol2']], row['label'])}"


def _chosen(options: Sequence[str], label: str | int) -> str:
    if int(label) < 0:
        raise ValueError(f"the label {label} names no answer")  # as test splits without answers have it
    return options[int(label)]


def _gsm8k(row: Mapping[str, Any]) -> str:
    solution = re.sub(r"<<.*?>>", "", row["answer"])  # the calculator marks are no language
    return f"Question: {row['question']}\nAnswer: {solution}"


def _mbpp(row: Mapping[str, Any]) -> str:
    return "\n\n".join([row["text"], row["code"], "\n".join(row["test_list"])])


def _instruction(row: Mapping[str, Any]) -> str:
    """What was asked, the text that it is about where there is one, and the answer."""
    about = row.get("context") or row.get("input")
    answer = row["response"] if "response" in row else row["output"]
    return "\n\n".join(part for part in (row["instruction"], about, answer) if part)


def _permissive_code(row: Mapping[str, Any]) -> str:
    """A source file under a permissive licence; no text for one under another."""
    return row["content"] if row["license"] in PERMISSIVE else ""


READERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "arc": _arc,
    "winogrande": _winogrande,
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "gsm8k": _gsm8k,
    "mbpp": _mbpp,
    "instruction": _instruction,
    "permissive_code": _permissive_code,
}


def document(source: CalibrationSource, row: Any, tokenizer: PreTrainedTokenizerBase | None) -> str | list[int]:
    """A row's text, or its token ids, without padding, where it holds them already; no text where a column that it needs
    is null. Without a tokenizer the messages of a chat are joined by blank lines, and padding stays.

    Raises `ValueError` where the row does not fit `source.text`, naming the columns that it has.
    """
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        return _unpadded(_token_ids(source, row), tokenizer)
    if "input_ids" in row:
        ids = _token_ids(source, row["input_ids"])
        if row.get("attention_mask") is None:
            return _unpadded(ids, tokenizer)
        mask = _token_ids(source, row["attention_mask"])
        if len(mask) != len(ids):
            raise ValueError(
                f"A row of source {source.name!r} has {len(ids)} input_ids but {len(mask)} in attention_mask."
            )
        return [token for token, real in zip(ids, mask, strict=True) if real]
    try:
        return _text(source.text, row, tokenizer)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"A row of source {source.name!r} does not fit {source.text!r}: {why}. "
            f"Its columns are: {', '.join(map(str, row)) or 'none'}."
        ) from error


def _unpadded(ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Without the padding at either end, where padding has a token of its own."""
    pad = tokenizer.pad_token_id if tokenizer is not None else None
    if tokenizer is None or pad is None or pad in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return ids
    real = [i for i, token in enumerate(ids) if token != pad]
    return ids[real[0] : real[-1] + 1] if real else []


def _token_ids(source: CalibrationSource, ids: Any) -> list[int]:
    try:
        return [operator.index(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError as error:
        raise ValueError(
            f"A row of source {source.name!r} is neither a text, nor a mapping of columns, nor a list of integer "
            f"token ids: {error}."
        ) from error


def _text(how: str, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> str:
    if how in READERS:
        return READERS[how](row)
    if how.startswith("chat:"):
        messages = row[how.removeprefix("chat:")]
        return _chat(messages, tokenizer) if messages is not None else ""
    return _filled(how, row)


def _filled(template: str, row: Mapping[str, Any]) -> str:
    fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    if not fields:
        raise unknown("reader", template, [*READERS, "chat:COLUMN", "a template such as '{text}'"])
    for field in fields:
        value = row[re.split(r"[.\[]", field)[0]]
        if value is None:
            return ""
        if field in row and isinstance(value, list | dict):
            raise TypeError(f"{field!r} holds a {type(value).__name__}, not a text")
    return template.format_map(row)


def _chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The messages in the tokenizer's chat template, or joined by blank lines where there is none."""
    import jinja2

    if tokenizer is None or not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses it ({error})") from error
