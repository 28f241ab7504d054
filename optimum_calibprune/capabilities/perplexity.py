# SPDX-License-Identifier: Apache-2.0
"""Perplexity on one text, as the pruning literature reports it: WikiText-2 in windows that do not overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..calibration.measure import Progress, mean_nll
from ..calibration.sources import OpenSource, rows
from ..records import CalibrationSource


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


WIKITEXT2 = CalibrationSource("WikiText-2", "general", "Salesforce/wikitext", "wikitext-2-raw-v1", split="test")


def read_text(source: CalibrationSource, token: str | None = None) -> str:
    """The whole text of a source, its rows joined by blank lines, as the GPTQ and SparseGPT code does for WikiText-2.

    Raises `ConnectionError` or `ValueError` where it cannot be had.
    """
    _, found = rows(OpenSource(source), token, shuffle=False)
    return "\n\n".join(row["text"] for row in found)


def text_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> np.ndarray:
    """Token ids `[windows, length]` of a text; the rest that fills no window is left out."""
    ids = np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
    if len(ids) < length:
        raise ValueError(f"The text for perplexity has {len(ids)} tokens, fewer than one window of {length}.")
    return ids[: len(ids) // length * length].reshape(-1, length)


def perplexity(model: PreTrainedModel, windows: np.ndarray, on_progress: Progress | None = None) -> float:
    """exp of the mean negative log-likelihood of tokens 2..length of every window."""
    return float(np.exp(mean_nll(model, windows, on_progress).mean()))
