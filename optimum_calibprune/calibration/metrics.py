# SPDX-License-Identifier: Apache-2.0
"""What tokens and text alone tell of samples: repetition, variety, compressibility, and the exact counts behind them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np


WAITING = 2**20  # keys that wait to be counted together; more where more are distinct
LEVEL = 9  # of zlib, the one at which gzip works by default


# --------------------------------------------------------------------------------------------- counting


def gram_keys(input_ids: np.ndarray) -> np.ndarray:
    """A key for each token 4-gram of samples `[samples, length]`: int64 `[2, samples * (length - 3)]`, two tokens a number.

    Unlike the codes of `measure.grams` they mean the same in every portion of a stream.
    """
    ids = input_ids.astype(np.int64)
    pairs = ids[:, :-1] << 32 | ids[:, 1:]
    return np.stack([pairs[:, :-2].reshape(-1), pairs[:, 2:].reshape(-1)])


class Tally:
    """How often each distinct key was seen, exactly, while keys arrive in portions of any size and in any order.

    Memory grows with the distinct keys and not with those seen: for keys of two numbers 24 bytes a distinct key, and up to
    130 while waiting keys are merged; below `WAITING` distinct keys, what that many would take.
    """

    def __init__(self, numbers: int = 1) -> None:
        """A key is `numbers` int64 numbers."""
        self._keys = np.empty((numbers, 0), dtype=np.int64)  # sorted
        self._counts = np.empty(0, dtype=np.int64)
        self._waiting: list[np.ndarray] = []
        self._waiting_keys = 0

    def add(self, keys: np.ndarray) -> None:
        """Counts keys `[numbers, keys]`."""
        self._waiting.append(keys)
        self._waiting_keys += keys.shape[1]
        if self._waiting_keys >= max(WAITING, len(self._counts)):
            self._merge()

    def counts(self) -> np.ndarray:
        """How often each distinct key was seen, int64 `[distinct]`, in the order of the keys."""
        self._merge()
        return self._counts

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *self._waiting], axis=1)
        counts = np.concatenate([self._counts, np.ones(self._waiting_keys, dtype=np.int64)])
        self._waiting, self._waiting_keys = [], 0
        order = np.lexsort(keys[::-1])  # by the first number, then by the second
        keys = keys[:, order]
        new = np.ones(keys.shape[1], dtype=bool)
        new[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
        first = np.flatnonzero(new)
        self._keys = keys[:, first]
        self._counts = np.add.reduceat(counts[order], first) if len(first) else counts


Seen = np.ndarray | Tally  # integer codes of all that was seen, of any shape; or a Tally of them


def _counts(seen: Seen) -> np.ndarray:
    return seen.counts() if isinstance(seen, Tally) else np.unique(seen, return_counts=True)[1]


# ---------------------------------------------------------------------------------------------- metrics


def duplicate_rate(grams: Seen) -> float:
    """The share of 4-grams that stood before: `1 - distinct / total`; 0 where nothing repeats.

    One reading of 4-gram aggregation, the one that selection minimises. Source: seq-rep-4 of Welleck et al. 2020, "Neural
    Text Generation With Unlikelihood Training", ICLR.
    """
    counts = _counts(grams)
    return 1.0 - len(counts) / int(counts.sum())


def collision_probability(grams: Seen) -> float:
    """The chance that two 4-grams drawn at random, with replacement, are the same: `sum over g of p(g)^2`; 1 for a loop.

    The other reading of 4-gram aggregation. Source: Simpson 1949, "Measurement of Diversity", Nature 163.
    """
    counts = _counts(grams)
    return float(((counts / counts.sum()) ** 2).sum())


def type_token_ratio(tokens: Seen) -> float:
    """The share of tokens that are new: `distinct / total`; it falls as a text grows, so compare texts of equal length.

    Source: Johnson 1944, "Studies in Language Behavior: A Program of Research", Psychological Monographs 56.
    """
    counts = _counts(tokens)
    return len(counts) / int(counts.sum())


def unigram_entropy(tokens: Seen) -> float:
    """How evenly tokens are used, in bits a token: `-sum over t of p(t) log2 p(t)`; 0 for a loop, log2(n) for n tokens
    that are equally frequent.

    p is the share in the text itself, so that a short text has less than its source would have. Source: Shannon 1948, "A
    Mathematical Theory of Communication", Bell System Technical Journal 27.
    """
    counts = _counts(tokens)
    shares = counts / counts.sum()
    return 0.0 - float((shares * np.log2(shares)).sum())


def compression_ratio(texts: Iterable[str]) -> float:
    """How many times smaller zlib makes the text: `bytes of the texts in UTF-8 / bytes of their zlib streams`; more where
    more repeats, below 1 where the text is too short to be compressed.

    Of text and not of token ids, so that it can be compared over tokenizers and with published numbers. Each sample is
    compressed alone: zlib looks back 32 KiB, so that across samples it would measure in which order they stand. Source:
    Shaib et al. 2024, "Standardizing the Measurement of Text Diversity", arXiv:2403.00553.
    """
    sizes = [text_bytes(text) for text in texts]
    return sum(plain for plain, _ in sizes) / sum(packed for _, packed in sizes)


def text_bytes(text: str) -> tuple[int, int]:
    """Bytes of a text in UTF-8, and of its zlib stream."""
    plain = text.encode("utf-8")
    return len(plain), len(zlib.compress(plain, LEVEL))
