# SPDX-License-Identifier: Apache-2.0
"""A metric of `evaluate`, or any callable, as the score of every item."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from evaluate import EvaluationModule

    Metric = EvaluationModule | Callable[[list[Any], list[Any]], float | Mapping[str, Any]]


def item_scores(
    metric: Metric, predictions: Sequence[Any], references: Sequence[Any], *, name: str | None = None
) -> tuple[float, ...]:
    """The score of each item, 0 to 1, since intervals and paired tests need the items.

    Each item is scored alone: a metric that is more than a mean over items, such as corpus BLEU, becomes the mean of its
    values for single items.

    Args:
        metric: what `evaluate.load` returns, or a function of (predictions, references), both lists of one, that returns a
            number or a dictionary as `compute` does.
        name: the entry that counts, where a dictionary has several.

    Raises:
        `ValueError` for lists of different lengths, and for a result that is not one number in [0, 1].
    """
    if len(predictions) != len(references):
        raise ValueError(f"A metric compares pairs; {len(predictions)} predictions and {len(references)} references.")
    pairs = zip(predictions, references, strict=True)
    return tuple(_number(_called(metric, prediction, reference), name) for prediction, reference in pairs)


def name_of(metric: Metric) -> str:
    """The name of a metric of `evaluate`, of a function its own."""
    return getattr(metric, "name", None) or getattr(metric, "__name__", type(metric).__name__)


def fingerprint_of(metric: Metric) -> str | None:
    """The hash of the files of what `evaluate.load` returns. None for all else: what a function does depends on whatever it
    refers to, so that no score may be taken for its own."""
    found = getattr(metric, "_hash", None) if hasattr(metric, "compute") else None
    return f"{metric.config_name} {found}" if found else None


def described(metric: Metric) -> str:
    """What tells a metric from others: name and hash of files, of a function its source. What a function refers to is not
    seen, so that this pairs scores which were kept, and lends none."""
    return f"{name_of(metric)} {fingerprint_of(metric) or source_of(metric)}"


def source_of(function: Any) -> str:
    """The source of a function; of what has none, such as a builtin or an object that can be called, the name."""
    try:
        return inspect.getsource(function)
    except (TypeError, OSError):
        return getattr(function, "__qualname__", type(function).__qualname__)


def _called(metric: Metric, prediction: Any, reference: Any) -> Any:
    compute = getattr(metric, "compute", None)
    if compute is not None:
        return compute(predictions=[prediction], references=[reference])
    return metric([prediction], [reference])


def _number(found: Any, name: str | None) -> float:
    if isinstance(found, Mapping):
        names = [key for key, value in found.items() if isinstance(_plain(value), int | float)]
        if name is None and len(names) != 1:
            raise ValueError(
                f"The metric returns {', '.join(found) or 'nothing'}; say which of them counts by its name."
            )
        if name is not None and name not in names:
            raise ValueError(f"The metric returns no number {name!r}, but {', '.join(found) or 'nothing'}.")
        found = found[name or names[0]]
    value = _plain(found)
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"The metric returns {value!r} for one item; a score is a number from 0 to 1.")
    return float(value)


def _plain(value: Any) -> Any:
    """A number of numpy or torch as Python's own."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) in (1, ()) else value
