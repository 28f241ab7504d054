# SPDX-License-Identifier: Apache-2.0
"""Perplexity on one text, as the pruning literature reports it: WikiText-2 in windows that do not overlap."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..calibration.measure import LogitsOf, Progress, mean_nll
from ..calibration.readers import document
from ..calibration.sources import OpenSource, rows
from ..records import CalibrationSource, PerplexityReport


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

LARGEST = 700.0  # nats, near the end of float64; a NaN is not below it either
WIKITEXT2 = CalibrationSource("WikiText-2", "general", "Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
WIKITEXT2_FILE = "wikitext2_test.jsonl"  # where it is among the tasks' local data
LOCAL_WIKITEXT2 = f"{WIKITEXT2.name}, {WIKITEXT2_FILE}"  # the name of that text


@dataclass(frozen=True)
class Text:
    """Windows `[windows, length]` of a text, or None where it cannot be had; then the report says why."""

    windows: np.ndarray | None
    report: PerplexityReport

    @property
    def fingerprint(self) -> str | None:
        """SHA-256 of the windows."""
        return hashlib.sha256(self.windows.tobytes()).hexdigest() if self.windows is not None else None

    def filled(self, dense: float | None, sparse: float | None) -> PerplexityReport:
        """The report with what was measured; a perplexity that is not finite is missing, with that reason."""
        lost = self.windows is not None and dense is None
        return replace(
            self.report, dense=dense, sparse=sparse, reason="it is not finite" if lost else self.report.reason
        )


def read(source: CalibrationSource, tokenizer: PreTrainedTokenizerBase, length: int, token: str | None = None) -> Text:
    """The text of a source, its rows joined by blank lines, as the GPTQ and SparseGPT code does with WikiText-2.

    Raises `ValueError` for a local file that cannot be read or has less than one window: the user named it.
    """
    import huggingface_hub

    try:
        _, found = rows(OpenSource(source), token, shuffle=False)
        documents = [document(source, row, tokenizer) for row in found]
        if not all(isinstance(text, str) for text in documents):
            raise ValueError(f"{source.name!r} holds token ids; perplexity is measured on a text.")
        windows = cut("\n\n".join(documents), tokenizer, length)
    except (ConnectionError, ValueError) as error:
        if source.path is not None:
            raise
        logger.warning("Perplexity is not measured: %s", error)
        offline = " (HF_HUB_OFFLINE is set)" if huggingface_hub.is_offline_mode() else ""
        return Text(None, PerplexityReport(source.name, length, reason=f"{source.repo} cannot be had here{offline}"))
    return Text(windows, PerplexityReport(source.name, length, tokens=int(windows.size)))


def cut(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> np.ndarray:
    """Token ids `[windows, length]` of a text; the rest that fills no window is left out."""
    ids = np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
    if len(ids) < length:
        raise ValueError(f"The text for perplexity has {len(ids)} tokens, fewer than one window of {length}.")
    return ids[: len(ids) // length * length].reshape(-1, length)


def perplexity(
    model: PreTrainedModel,
    windows: np.ndarray,
    on_progress: Progress | None = None,
    logits_of: LogitsOf | None = None,
) -> float | None:
    """exp of the mean negative log-likelihood of tokens 2..length of every window; None where it is not finite."""
    mean = mean_nll(model, windows, on_progress, logits_of).mean()
    return float(np.exp(mean)) if mean < LARGEST else None
